"""Local task files: their prompts against those of lm-eval's own tasks, and their refusals."""

import json
from pathlib import Path

import datasets
import lm_eval.tasks
import pytest
from huggingface_hub.errors import HTTPError
from lm_eval.tasks import TaskManager

from lpdeploy.errors import DataError
from lpdeploy.evaluation import harness
from lpdeploy.evaluation.harness import load_tasks
from lpdeploy.evaluation.results import PAPER_METRICS, Figures
from tests.evaluation.task_files import write_rows
from tests.helpers import need_shared

FOLDERS = ["piqa", "arc", "winogrande", "hellaswag", "openbookqa", "super_glue/boolq", "mmlu"]

# The same items twice: as the hub has them, and as a local file has them.
ARC = {"text": ["the sun", "a stone", "it rains"], "label": ["A", "B", "C"]}
HUB = {
    "baber/piqa": {"goal": "dry a shoe", "sol1": "put it in the sun", "sol2": "eat it", "label": 0},
    "allenai/ai2_arc": {"question": "What is hot?", "choices": ARC, "answerKey": "A"},
    "allenai/openbookqa": {"question_stem": "What is hot is", "choices": ARC, "answerKey": "A"},
    "allenai/winogrande": {
        "sentence": "The cup did not fit the box as _ was too big.",
        "option1": "the cup",
        "option2": "the box",
        "answer": "1",
    },
    "Rowan/hellaswag": {
        "activity_label": "Baking",
        "ctx_a": "A man has a bowl.",
        "ctx_b": "he",
        "endings": ["stirs it.", "sleeps.", "bakes [title] bread.", "sings."],
        "label": "0",
    },
    "aps/super_glue": {"passage": "Ice melts.", "question": "does ice melt", "label": 1},
    "cais/mmlu": {
        "question": " Where is the heart?",
        "choices": ["foot", "hand", "chest", "head"],
        "answer": 2,
    },
}
# lm-eval never shows WinoGrande a copy of the question.
HUB_TRAIN = {
    "allenai/winogrande": {
        "train": {"sentence": "Ann saw _ leave.", "option1": "Bo", "option2": "Cy", "answer": "2"}
    }
}
LOCAL_SHOTS = {
    "winogrande": {
        "context_options": ["Ann saw Bo", "Ann saw Cy"],
        "continuation": "leave.",
        "gold": 1,
    }
}
LETTERS = "Where is the heart?\nA. foot\nB. hand\nC. chest\nD. head"
LOCAL = {
    "piqa": [
        {"query": "Question: dry a shoe\n", "choices": ["put it in the sun", "eat it"], "gold": 0}
    ],
    "arc_easy": [{"query": "Question: What is hot?", "choices": ARC["text"], "gold": 0}],
    "arc_challenge": [{"query": "Question: What is hot?", "choices": ARC["text"], "gold": 0}],
    "openbookqa": [{"query": "What is hot is", "choices": ARC["text"], "gold": 0}],
    "winogrande": [
        {
            "context_options": [
                "The cup did not fit the box as the cup",
                "The cup did not fit the box as the box",
            ],
            "continuation": "was too big.",
            "gold": 0,
        }
    ],
    "hellaswag": [
        {
            "query": "Baking: A man has a bowl. He",
            "choices": ["stirs it.", "sleeps.", "bakes. bread.", "sings."],
            "gold": 0,
        }
    ],
    "boolq": [
        {
            "query": f"Ice melts.\nQuestion: does ice melt?{end}",
            "choices": ["no", "yes"],
            "gold": 1,
        }
        for end in ("", "\n", "\nAnswer:", "\nAnswer: ")
    ],
    "mmlu/anatomy": [
        {
            "query": " Where is the heart?",
            "choices": ["foot", "hand", "chest", "head"],
            "gold": 2,
        },
        {"query": f"{LETTERS}\n", "choices": ["A", "B", "C", "D"], "gold": 2},
        {"query": f"{LETTERS}\nAnswer:", "choices": ["A", "B", "C", "D"], "gold": 2},
    ],
}
SPLITS = ["train", "validation", "test", "dev"]


@pytest.fixture
def hub(monkeypatch):
    """lm-eval's own definitions, over six equal rows a data set in place of the hub's."""
    asked = []

    def load(path, name=None, **_):
        asked.append((path, name))
        rows = dict.fromkeys(SPLITS, HUB[path]) | HUB_TRAIN.get(path, {})
        return datasets.DatasetDict(
            {split: datasets.Dataset.from_list([row] * 6) for split, row in rows.items()}
        )

    root = Path(lm_eval.tasks.__file__).parent
    paths = [str(root / name) for name in FOLDERS]
    # Only where these tasks are: reading all of its definitions takes long.
    monkeypatch.setattr(
        harness,
        "TaskManager",
        lambda: TaskManager(include_defaults=False, include_path=paths),
    )
    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for name, rows in LOCAL.items():
        write_rows(folder / f"{name}.jsonl", rows)
    return folder


def list_requests(task):
    task.build_all_requests()
    rows = {}
    for request in task.instances:
        rows.setdefault(request.doc_id, []).append(request.args)
    return list(rows.values())


def get_answer(task):
    row = task.eval_docs[0]
    return task.doc_to_text(row) if task.multiple_input else task.doc_to_target(row)


class TestPrompts:
    @pytest.mark.usefixtures("hub")
    @pytest.mark.parametrize("name", PAPER_METRICS)
    def test_those_of_lm_eval(self, local, name):
        theirs = load_tasks([name]).tasks[name]
        ours = load_tasks([name], task_data=local).tasks[name]
        expected = list_requests(theirs)[0]
        for found in list_requests(ours):
            assert found == expected
        assert int(get_answer(ours)) == int(get_answer(theirs))
        assert set(ours.aggregation()) == set(theirs.aggregation())

    @pytest.mark.slow
    @pytest.mark.usefixtures("hub")
    def test_those_of_mmlu(self, local):
        theirs = load_tasks(["mmlu"], num_fewshot=0)
        ours = load_tasks(["mmlu"], task_data=local, num_fewshot=0)
        expected = list_requests(theirs.tasks["mmlu_anatomy"])[0]
        for found in list_requests(ours.tasks["mmlu_anatomy"]):
            assert found == expected
        assert ours.rows == theirs.rows == ["mmlu"]
        assert set(ours.tasks["mmlu_anatomy"].aggregation()) == {"acc"}
        assert ours.groups["mmlu"].has_aggregation

    @pytest.mark.slow
    @pytest.mark.usefixtures("hub")
    def test_five_shots_of_mmlu(self, tmp_path):
        write_rows(tmp_path / "mmlu" / "anatomy.jsonl", LOCAL["mmlu/anatomy"][:1])
        write_rows(tmp_path / "mmlu" / "anatomy.shots.jsonl", LOCAL["mmlu/anatomy"][:1] * 5)
        theirs, ours = load_tasks(["mmlu"]), load_tasks(["mmlu"], task_data=tmp_path)
        expected = list_requests(theirs.tasks["mmlu_anatomy"])[0]
        assert expected[0][0].count("Answer: C") == 5
        assert list_requests(ours.tasks["mmlu_anatomy"])[0] == expected

    @pytest.mark.usefixtures("hub")
    @pytest.mark.parametrize("name", ["arc_easy", "winogrande"])
    def test_shots(self, tmp_path, name):
        write_rows(tmp_path / f"{name}.jsonl", LOCAL[name])
        write_rows(tmp_path / f"{name}.shots.jsonl", [LOCAL_SHOTS.get(name, LOCAL[name][0])] * 2)
        theirs = load_tasks([name], num_fewshot=2).tasks[name]
        ours = load_tasks([name], task_data=tmp_path, num_fewshot=2).tasks[name]
        for task in (theirs, ours):
            task.set_fewshot_seed(seed=1)
        assert list_requests(ours)[0] == list_requests(theirs)[0]

    def test_a_question_is_not_its_own_example(self, tmp_path):
        row = {"query": "q", "choices": ["a", "b"], "gold": 0}
        rows = [{**row, "query": f"q{n}."} for n in range(4)]
        write_rows(tmp_path / "own.jsonl", rows)
        task = load_tasks(["own"], task_data=tmp_path, num_fewshot=3).tasks["own"]
        task.set_fewshot_seed(seed=1)
        for row, requests in zip(rows, list_requests(task), strict=True):
            assert requests[0][0].count(row["query"]) == 1
            assert requests[0][0].endswith(row["query"])

    @pytest.mark.parametrize("text", ["12", "{{ 1 + 1 }}", "[1]"])
    def test_text_is_not_read_as_anything_else(self, tmp_path, text):
        row = {"query": text, "choices": [text, "x"], "gold": 0}
        write_rows(tmp_path / "own.jsonl", [row])
        write_rows(tmp_path / "piqa.jsonl", [row])
        found = load_tasks(["own", "piqa"], task_data=tmp_path)
        assert list_requests(found.tasks["own"]) == [[(text, f" {text}"), (text, " x")]]
        asked = f"{text}\nAnswer:"
        assert list_requests(found.tasks["piqa"]) == [[(asked, f" {text}"), (asked, " x")]]

    @pytest.mark.real
    def test_real_files(self):
        folder = need_shared() / "data" / "tasks"
        found = load_tasks(["piqa", "arc_easy", "arc_challenge", "winogrande"], task_data=folder)
        sizes = {name: len(task.eval_docs) for name, task in found.tasks.items()}
        assert sizes == {"piqa": 1838, "arc_easy": 2376, "arc_challenge": 1172, "winogrande": 1267}
        task = found.tasks["piqa"]
        task.build_all_requests(limit=2)
        assert task.instances[2].args == ("Question: dresser\nAnswer:", *task.instances[2].args[1:])
        assert task.instances[2].args[1] == " replace drawer with bobby pin"


class TestAverage:
    def test_each_task_by_its_own_accuracy(self):
        measured = {name: {"acc": 0.1, "acc_norm": 0.8} for name in PAPER_METRICS}
        measured["mmlu"] = {"acc": 0.9}
        found = Figures(tasks=measured)
        assert found.average == pytest.approx((4 * 0.1 + 3 * 0.8) / 7)
        assert found.average_over == [
            *("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge"),
            "openbookqa",
        ]

    def test_over_what_was_run(self):
        measured = {"openbookqa": {"acc": 0, "acc_norm": 0.3}, "boolq": {"acc": 0.5}}
        found = Figures(tasks=measured)
        assert (found.average, found.average_over) == (pytest.approx(0.4), ["boolq", "openbookqa"])
        others = Figures(tasks={"mmlu": {"acc": 1}})
        assert (others.average, others.average_over) == (None, [])

    def test_standard_errors(self):
        """Of a mean of independent samples: the root of the summed squares, over their number."""
        boolq = {"acc": 0.5, "acc_stderr": 0.03}
        openbookqa = {"acc": 0.1, "acc_norm": 0.3, "acc_stderr": 0.01, "acc_norm_stderr": 0.04}
        mmlu = {"acc": 0.2, "acc_stderr": 0.5}
        found = Figures(tasks={"boolq": boolq, "openbookqa": openbookqa, "mmlu": mmlu}).errors
        assert found == pytest.approx({"boolq": 0.03, "openbookqa": 0.04, "average": 0.025})

    def test_no_standard_error_of_one_document(self):
        measured = {"boolq": {"acc": 0.5, "acc_stderr": 0.03}, "piqa": {"acc": 1.0}}
        assert Figures(tasks=measured).errors == {"boolq": 0.03}
        assert Figures(tasks={"piqa": {"acc": 1.0, "acc_stderr": None}}).errors == {}

    def test_of_the_papers_row(self):
        """LLaMA-7B in Table 5."""
        row = dict(
            zip(PAPER_METRICS, (73.18, 78.35, 72.99, 67.01, 67.45, 41.38, 42.40), strict=True)
        )
        measured = {name: {metric: row[name]} for name, metric in PAPER_METRICS.items()}
        assert Figures(tasks=measured).average == pytest.approx(63.25, abs=0.005)


class TestHub:
    @pytest.mark.slow
    def test_default_shots(self, hub):
        found = load_tasks(["piqa", "mmlu"])
        assert found.tasks["piqa"].get_config("num_fewshot") == 0
        assert found.tasks["mmlu_anatomy"].get_config("num_fewshot") == 5
        assert ("baber/piqa", None) in hub
        assert ("cais/mmlu", "anatomy") in hub
        given = load_tasks(["piqa", "mmlu_anatomy"], num_fewshot=2)
        assert {task.get_config("num_fewshot") for task in given.tasks.values()} == {2}

    @pytest.mark.usefixtures("hub")
    def test_a_tag_stands_for_its_tasks(self):
        assert sorted(load_tasks(["ai2_arc"]).rows) == ["arc_challenge", "arc_easy"]

    def test_an_unknown_task_has_near_names(self, hub):
        with pytest.raises(
            DataError, match="no task 'arc_esy'. Did you mean 'arc_easy'.*lm-eval ls tasks"
        ):
            load_tasks(["piqa", "arc_esy"])
        with pytest.raises(DataError, match="no task 'qqqqqq'. Give one that"):
            load_tasks(["qqqqqq"])
        assert hub == []  # names are checked before anything is downloaded

    @pytest.mark.usefixtures("hub")
    @pytest.mark.parametrize("error", [ConnectionError, HTTPError, ValueError, ImportError])
    def test_out_of_reach(self, monkeypatch, error):
        def fail(*_, **__):
            raise error("no way\nand more")

        monkeypatch.setattr(datasets, "load_dataset", fail)
        with pytest.raises(
            DataError, match=r"'piqa' cannot be loaded \(no way\)\. Check .*`task_data`\.$"
        ):
            load_tasks(["piqa"])

    def test_a_task_that_takes_no_shots(self, monkeypatch):
        class Fixed:
            def get_config(self, key):
                return {"num_fewshot": 0}[key]

        class Manager:
            all_tasks = ("fixed",)

            def load(self, names):
                return {"tasks": {name: Fixed() for name in names}}

        monkeypatch.setattr(harness, "TaskManager", Manager)
        with pytest.raises(DataError, match="fixes 'fixed' to 0 examples. Leave `num_fewshot=3`"):
            load_tasks(["fixed"], num_fewshot=3)


QUERY = {"query": "q", "choices": ["a", "b"], "gold": 0}
CONTEXTS = {"context_options": ["a", "b"], "continuation": "c", "gold": 0}


class TestRefusals:
    @pytest.mark.parametrize("row", [QUERY, CONTEXTS], ids=["query", "contexts"])
    def test_a_missing_field(self, tmp_path, row):
        for field in row:
            broken = {key: value for key, value in row.items() if key != field}
            path = write_rows(tmp_path / "piqa.jsonl", [row, broken])
            with pytest.raises(DataError, match=f"'{path}', line 2, has no '{field}'. Give it "):
                load_tasks(["piqa"], task_data=tmp_path)

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            ({"query": 3}, "'query' is 3. Make it a text"),
            ({"query": " "}, "'query' is ' '. Make it a text"),
            ({"choices": "ab"}, "'choices' is 'ab'. Make it a list of two or more texts"),
            ({"choices": ["a"]}, r"'choices' is \['a'\]. Make it a list"),
            ({"choices": ["a", ""]}, "'choices' is .* Make it a list"),
            ({"choices": ["a", 3]}, "'choices' is .* Make it a list"),
            ({"gold": 2}, "'gold' is 2. Make it the index .* of the 2 choices, 0 to 1"),
            ({"gold": -1}, "'gold' is -1. Make it the index"),
            ({"gold": "0"}, "'gold' is '0'. Make it the index"),
            ({"gold": True}, "'gold' is True. Make it the index"),
        ],
    )
    def test_a_wrong_value(self, tmp_path, change, sentence):
        path = write_rows(tmp_path / "piqa.jsonl", [QUERY, QUERY | change])
        with pytest.raises(DataError, match=f"'{path}', line 2,: {sentence}"):
            load_tasks(["piqa"], task_data=tmp_path)

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            ({"continuation": ""}, "'continuation' is ''. Make it a text"),
            ({"context_options": ["a"]}, "'context_options' is .* Make it a list"),
            ({"gold": 2}, "'gold' is 2. .* of the 2 context_options, 0 to 1"),
        ],
    )
    def test_a_wrong_value_of_contexts(self, tmp_path, change, sentence):
        write_rows(tmp_path / "winogrande.jsonl", [CONTEXTS, CONTEXTS | change])
        with pytest.raises(DataError, match=sentence):
            load_tasks(["winogrande"], task_data=tmp_path)

    def test_shots_are_checked_too(self, tmp_path):
        write_rows(tmp_path / "piqa.jsonl", [QUERY])
        write_rows(tmp_path / "piqa.shots.jsonl", [QUERY, QUERY | {"gold": 7}])
        with pytest.raises(DataError, match=r"piqa\.shots\.jsonl', line 2,: 'gold' is 7"):
            load_tasks(["piqa"], task_data=tmp_path)

    def test_malformed_json(self, tmp_path):
        path = tmp_path / "piqa.jsonl"
        path.write_text(json.dumps(QUERY) + "\n{oops\n")
        with pytest.raises(
            DataError, match=f"'{path}', line 2, is not valid JSON .*one object per"
        ):
            load_tasks(["piqa"], task_data=tmp_path)

    def test_a_line_that_is_no_object(self, tmp_path):
        write_rows(tmp_path / "piqa.jsonl", [3])
        with pytest.raises(DataError, match="line 1, is a int. Give an object with named fields"):
            load_tasks(["piqa"], task_data=tmp_path)

    def test_an_empty_file(self, tmp_path):
        write_rows(tmp_path / "piqa.jsonl", [])
        with pytest.raises(DataError, match="holds no items. Put one object per line into it"):
            load_tasks(["piqa"], task_data=tmp_path)

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(DataError, match=r"No 'piqa\.jsonl' in '.*', which holds no task\. G"):
            load_tasks(["piqa"], task_data=tmp_path)
        write_rows(tmp_path / "piqa.jsonl", [QUERY])
        write_rows(tmp_path / "mmlu" / "anatomy.jsonl", [QUERY])
        with pytest.raises(
            DataError, match=r"which holds piqa, mmlu\. Did you mean 'piqa'\? .* put the file ther"
        ):
            load_tasks(["pika"], task_data=tmp_path)

    def test_too_few_examples(self, tmp_path):
        rows = [QUERY, QUERY, QUERY | {"gold": 1}]  # a copy of the question is no example
        write_rows(tmp_path / "piqa.jsonl", rows)
        sentence = r"has 1 examples for 2 shots\. Use `num_fewshot=1` or less, or give more in"
        with pytest.raises(DataError, match=sentence):
            load_tasks(["piqa"], task_data=tmp_path, num_fewshot=2)
        write_rows(tmp_path / "piqa.shots.jsonl", [QUERY])
        with pytest.raises(DataError, match=sentence):
            load_tasks(["piqa"], task_data=tmp_path, num_fewshot=2)
