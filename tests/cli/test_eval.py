"""`lpdeploy eval --tasks` as users and scripts meet it."""

import json

import pytest
import yaml

from tests.cli.test_cli import check_refused, invoke, last_json
from tests.evaluation.task_files import make_model, make_task_files, write_rows
from tests.helpers import make_text

SMALL = [
    "--steps", "2", "--batch-size", "2", "--micro-batch-size", "2", "--seq-len", "16",
    "--prune-every", "1", "--round-to", "4", "--device", "cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_task_files(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    data = make_text(root / "text.txt")
    assert invoke("prune", model, "--data", data, "--output", root / "run", *SMALL).exit_code == 0
    assert invoke("compact", root / "run").exit_code == 0
    return root / "run"


def test_the_json_of_the_contract(model, folder):
    words = ("--tasks", "piqa, winogrande,mmlu", "--task-data", folder, "--limit", 6, "--json")
    result = invoke("eval", model, *words)
    found = last_json(result)
    assert {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "n"} <= found["tasks"][
        "piqa"
    ].keys()
    assert {name: measured["n"] for name, measured in found["tasks"].items()} == {
        "piqa": 6,
        "winogrande": 6,
        "mmlu": 6,
    }
    assert found["average_over"] == ["piqa", "winogrande"]
    assert 0 <= found["average"] <= 1
    cut, *lines = result.stderr.splitlines()  # five examples fill 128 positions
    assert "longer than the model's 128 positions: only their ends were read" in cut
    assert len(lines) == 4  # three tasks and their average
    assert "on piqa: acc 0." in lines[0] or "on piqa: acc 1." in lines[0]
    assert ", n 6" in lines[0]
    assert "average of piqa, winogrande: " in lines[3]


@pytest.mark.slow
def test_a_run_keeps_both_kinds(run, folder):
    text = run.parent / "text.txt"
    perplexity = last_json(
        invoke("eval", run, "--perplexity", text, "--seq-len", "16", "--with-base", "--json")
    )
    words = ("--tasks", "arc_easy", "--task-data", folder, "--with-base", "--json")
    tasks = last_json(invoke("eval", run, *words))
    assert tasks["perplexity"] == {}
    assert tasks["base"]["tasks"]["arc_easy"]["n"] == 12
    kept = json.loads((run / "eval.json").read_text())
    assert kept["perplexity"] == perplexity["perplexity"]
    assert kept["tasks"] == tasks["tasks"]
    assert kept["base"]["perplexity"] == perplexity["base"]["perplexity"]
    assert kept["base"]["tasks"] == tasks["base"]["tasks"]
    page = invoke("report", run)
    assert page.exit_code == 0, page.output
    text = (run / "report.html").read_text()
    assert text.count("% of arc_easy</td>") == 2  # the dense and the pruned model
    assert "% over 1 task</p>" in text


def test_a_recipe_may_list_the_tasks(model, folder, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump({"eval": {"tasks": ["piqa"], "task_data": str(folder), "num_fewshot": 2}})
    )
    found = last_json(invoke("eval", model, "--recipe", recipe, "--json"))
    assert found["tasks"]["piqa"]["num_fewshot"] == 2


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "Nothing to measure. Give --perplexity, --tasks, or both."),
        (["--tasks", ""], "'' is empty. Give values, separated by commas"),
        (["--tasks", " , "], "' , ' is empty"),
        (["--perplexity", "x", "--limit", "3"], "--limit needs --tasks. Give --tasks too"),
        (["--tasks", "piqa", "--limit", "0"], "0 is not in the range from 1 to"),
        (["--tasks", "piqa", "--batch-size", "0"], "0 is not in the range from 1 to"),
        (["--tasks", "piqa", "--num-fewshot", "-1"], "-1 is not in the range from 0 to"),
        (["--tasks", "piqa", "--task-data", "nowhere"], "'nowhere' does not exist"),
        (["--tasks", "piqa", "--max-segments", "3"], "--max-segments needs --perplexity"),
    ],
)
def test_wrong_usage_exits_2(model, words, sentence):
    check_refused(invoke("eval", model, *words), sentence, code=2)


def test_bad_tasks_exit_1_and_leave_the_run_alone(run, tmp_path):
    before = (run / "eval.json").read_bytes() if (run / "eval.json").is_file() else None
    write_rows(tmp_path / "piqa.jsonl", [{"query": "w1", "choices": ["w2", "w3"]}])

    def refuse(name, sentence):
        check_refused(invoke("eval", run, "--tasks", name, "--task-data", tmp_path), sentence)

    refuse("piqa", "piqa.jsonl', line 1, has no 'gold'")
    refuse("pica", "No 'pica.jsonl' .* Did you mean 'piqa'")
    after = (run / "eval.json").read_bytes() if (run / "eval.json").is_file() else None
    assert after == before
