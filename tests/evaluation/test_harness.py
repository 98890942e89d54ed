"""Our model for lm-eval against its own HFLM, item by item, and how tasks are loaded."""

import pytest
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from lpdeploy.engines.onnx.exporter import export_onnx
from lpdeploy.engines.onnx.runner import load_onnx_runner
from lpdeploy.engines.torch.runner import load_torch_runner
from lpdeploy.errors import ArtifactError, DataError
from lpdeploy.evaluation.harness import RunnerLM, load_tasks, run_tasks
from lpdeploy.models.loading import load_config, load_model, load_tokenizer
from tests.evaluation.task_files import make_model, make_task_files, write_rows
from tests.helpers import need_shared

NAMES = ["piqa", "arc_easy", "winogrande", "mmlu"]
# fp32 logits of batches padded to other lengths, summed over the tokens of an answer.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_task_files(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module", params=[True, False], ids=["bos", "no-bos"])
def model(request, tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "m", adds_bos=request.param)


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "m")


def build_reference(model, *, batch_size=3):
    tokenizer = load_tokenizer(model, load_config(model))
    return HFLM(load_model(model), tokenizer=tokenizer, batch_size=batch_size, device="cpu")


def build_ours(model, *, runner=None, **options):
    tokenizer = load_tokenizer(model, load_config(model))
    return RunnerLM(runner or load_torch_runner(model), tokenizer, **options)


def build_requests(found, *, limit=None):
    requests = []
    for task in found.tasks.values():
        task.set_fewshot_seed(seed=1234)
        task.build_all_requests(limit=limit)
        requests += task.instances
    return requests


def check_equal(ours, reference, *, tolerance=TOLERANCE):
    assert len(ours) == len(reference)
    for mine, other in zip(ours, reference, strict=True):
        assert mine[0] == pytest.approx(other[0], abs=tolerance)
        assert mine[1] == other[1]


def make_requests(kind, *arguments):
    return [Instance(kind, {}, item, 0) for item in arguments]


class TestAgainstHFLM:
    @pytest.mark.parametrize("shots", [None, 3])
    def test_each_item(self, model, folder, shots):
        requests = build_requests(load_tasks(NAMES, task_data=folder, num_fewshot=shots))
        assert len(requests) == 12 * (2 + 2 + 4) + 12 * 4
        ours = build_ours(model, batch_size=5)
        longest = max(len(ours.tok_encode(request.args[0])) for request in requests)
        assert longest > ours.runner.max_positions  # something is truncated
        expected = build_reference(model).loglikelihood(requests, disable_tqdm=True)
        check_equal(ours.loglikelihood(requests), expected)

    def test_metrics(self, model, folder):
        found = load_tasks(NAMES, task_data=folder)
        expected = evaluate(
            lm=build_reference(model), task_dict={"tasks": found.tasks, "groups": {}}
        )["results"]
        tokenizer = load_tokenizer(model, load_config(model))
        measured = run_tasks(found, load_torch_runner(model), tokenizer)
        assert list(measured) == NAMES
        for name in NAMES:
            for metric, value in measured[name].items():
                if metric not in {"n", "num_fewshot"}:
                    assert value == pytest.approx(expected[name][f"{metric},none"], abs=1e-12)
            assert measured[name]["n"] == 12
            assert measured[name]["num_fewshot"] == (5 if name == "mmlu" else 0)
        assert "acc_norm_stderr" in measured["arc_easy"]
        assert "acc_norm" not in measured["mmlu"] | measured["winogrande"]

    def test_special_texts(self, model):
        """An empty context, one that brings its bos, one that ends with spaces."""
        pairs = [("", "w1 w2"), ("", "<s> w4"), ("<s> w3", " w4"), ("w3  ", "w4"), ("w5", " w6 w7")]
        requests = make_requests("loglikelihood", *pairs)
        expected = build_reference(model).loglikelihood(requests, disable_tqdm=True)
        check_equal(build_ours(model).loglikelihood(requests), expected)

    def test_rolling(self, model):
        texts = [(" ".join(f"w{n % 60}" for n in range(300)),), ("w1",), ("w7 w8 w9",)]
        requests = make_requests("loglikelihood_rolling", *texts)
        expected = build_reference(model).loglikelihood_rolling(requests, disable_tqdm=True)
        # A sum over 300 tokens of windows of 128.
        found = build_ours(model).loglikelihood_rolling(requests)
        assert found == pytest.approx(expected, abs=1e-3)

    def test_generation(self, model):
        texts = [f"w{n} w{n + 3} w{n + 9}" for n in range(5)] + [" ".join(["w4"] * 150)]
        reference, ours = build_reference(model, batch_size=1), build_ours(model, batch_size=4)

        def generate(until):
            options = {"until": until, "max_gen_toks": 20, "do_sample": False}
            requests = make_requests("generate_until", *[(text, options) for text in texts])
            expected = reference.generate_until(requests, disable_tqdm=True)
            assert ours.generate_until(requests) == expected
            return expected

        whole = generate(["</s>"])
        # A word of some text that it does not start with.
        text, stop = next((t, w) for t in whole for w in t.split() if t.find(w) > 0)
        cut = generate([stop, "nothing"])
        assert cut[whole.index(text)] == text[: text.find(stop)]

    @pytest.mark.slow
    @pytest.mark.real
    def test_real_tasks(self):
        shared = need_shared()
        model, limit = shared / "models" / "tinystories-llama-6M", 8
        found = load_tasks(["piqa", "arc_easy", "winogrande"], task_data=shared / "data" / "tasks")
        requests = build_requests(found, limit=limit)
        expected = build_reference(model).loglikelihood(requests, disable_tqdm=True)
        check_equal(build_ours(model).loglikelihood(requests), expected)


@pytest.mark.slow
def test_onnx_agrees_with_torch(with_bos, folder, tmp_path):
    export_onnx(with_bos, tmp_path / "onnx")
    onnx = load_onnx_runner(tmp_path / "onnx")
    found = load_tasks(NAMES, task_data=folder)
    requests = build_requests(found)
    expected = build_ours(with_bos).loglikelihood(requests)
    check_equal(build_ours(with_bos, runner=onnx).loglikelihood(requests), expected)
    tokenizer = load_tokenizer(with_bos, load_config(with_bos))
    assert run_tasks(found, onnx, tokenizer) == run_tasks(
        found, load_torch_runner(with_bos), tokenizer
    )


class TestRunning:
    def test_limit_and_progress(self, with_bos, folder, capsys):
        tokenizer = load_tokenizer(with_bos, load_config(with_bos))
        told = []
        measured = run_tasks(
            load_tasks(["piqa", "winogrande"], task_data=folder),
            load_torch_runner(with_bos),
            tokenizer,
            limit=3,
            batch_size=4,
            on_progress=lambda *now: told.append(now),
        )
        assert [measured[name]["n"] for name in measured] == [3, 3]
        assert told[-1] == (12, 12)
        assert [done for done, _ in told] == sorted(done for done, _ in told)
        printed = capsys.readouterr()
        assert printed.out == ""
        assert "it/s" not in printed.err  # no bar of lm-eval's

    def test_what_is_cut_is_told(self, with_bos, folder, caplog):
        tokenizer = load_tokenizer(with_bos, load_config(with_bos))
        runner = load_torch_runner(with_bos)
        run_tasks(load_tasks(["piqa"], task_data=folder), runner, tokenizer, limit=2)
        assert "only their ends were read" not in caplog.text
        runner.max_positions = 6
        run_tasks(load_tasks(["piqa"], task_data=folder), runner, tokenizer, limit=2)
        assert "questions are longer than the model's 6 positions: only their" in caplog.text

    def test_one_document_has_no_standard_error(self, with_bos, folder):
        tokenizer = load_tokenizer(with_bos, load_config(with_bos))
        found = load_tasks(["piqa"], task_data=folder)
        measured = run_tasks(found, load_torch_runner(with_bos), tokenizer, limit=1)
        assert measured["piqa"]["acc_stderr"] is None
        assert measured["piqa"]["acc"] in {0.0, 1.0}

    def test_a_second_model_sees_the_same_examples(self, with_bos, folder):
        tokenizer = load_tokenizer(with_bos, load_config(with_bos))
        found = load_tasks(["arc_easy"], task_data=folder, num_fewshot=4)
        contexts = []
        for _ in range(2):
            run_tasks(found, load_torch_runner(with_bos), tokenizer)
            contexts.append([request.args for request in found.tasks["arc_easy"].instances])
        assert contexts[0] == contexts[1]

    def test_subjects_are_weighted_by_their_size(self, with_bos, tmp_path):
        row = {"query": "w1", "choices": ["w2", "w3"], "gold": 0}
        write_rows(tmp_path / "mmlu" / "high_school_w1.jsonl", [row] * 3)
        write_rows(tmp_path / "mmlu" / "w2.jsonl", [{**row, "gold": 1}])
        tokenizer = load_tokenizer(with_bos, load_config(with_bos))
        found = load_tasks(["mmlu"], task_data=tmp_path, num_fewshot=0)
        assert found.rows == ["mmlu"]
        found.rows += sorted(found.tasks)
        whole, first, second = run_tasks(found, load_torch_runner(with_bos), tokenizer).values()
        assert (whole["n"], first["n"], second["n"]) == (4, 3, 1)
        assert first["acc"] != second["acc"]  # or the weights would not show
        assert whole["acc"] == pytest.approx((3 * first["acc"] + second["acc"]) / 4)
        request = found.tasks["mmlu_high_school_w1"].instances[0]
        about = "The following are multiple choice questions (with answers) about high school w1."
        assert request.args == (f"{about}\n\nw1\nA. w2\nB. w3\nAnswer:", " A")


class TestRefusals:
    def test_tokenizer_without_bos_and_eos(self, with_bos):
        tokenizer = load_tokenizer(with_bos, load_config(with_bos))
        tokenizer.bos_token = tokenizer.eos_token = None
        with pytest.raises(ArtifactError, match="neither bos nor eos.*tokenizer_config.json"):
            RunnerLM(load_torch_runner(with_bos), tokenizer)

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"do_sample": True, "temperature": 0.7}, "sampling or beams .*Leave the task out"),
            ({"num_beams": 4}, "sampling or beams .*Leave the task out"),
            ({"max_gen_toks": 128}, "128 tokens, the model has only 128 positions. Leave the"),
        ],
    )
    def test_generation_that_is_not_offered(self, with_bos, options, sentence):
        requests = make_requests("generate_until", ("w1", {"until": ["w2"], **options}))
        with pytest.raises(DataError, match=sentence):
            build_ours(with_bos).generate_until(requests)

    def test_a_task_that_is_asked_for_twice(self, folder, tmp_path):
        row = {"query": "w1", "choices": ["w2", "w3"], "gold": 0}
        write_rows(tmp_path / "mmlu" / "w1.jsonl", [row])
        write_rows(tmp_path / "mmlu_w1.jsonl", [row])
        with pytest.raises(DataError, match="'mmlu_w1' holds 'mmlu_w1', which .* Name one only"):
            load_tasks(["mmlu", "mmlu_w1"], task_data=tmp_path, num_fewshot=0)
        assert load_tasks(["piqa", "piqa"], task_data=folder).rows == ["piqa"]
