"""The stage: what it refuses, and what it keeps of an earlier evaluation."""

import builtins
import json
import sys
from dataclasses import replace

import pytest

from lpdeploy.errors import ArtifactError, MissingDependencyError
from lpdeploy.evaluation.evaluate import evaluate
from lpdeploy.evaluation.options import EvalOptions
from lpdeploy.evaluation.results import Evaluation, Figures, Perplexity
from lpdeploy.records import load_json
from tests.evaluation.task_files import make_model, make_task_files
from tests.helpers import make_text


def make_result(*, perplexity=(), tasks=(), seq_len=16, sha="x", engine="torch", base=False):
    figures = Figures(
        {name: Perplexity(2.0, 1.0, 10) for name in perplexity},
        {name: {"acc": value} for name, value in tasks},
    )
    return Evaluation(
        model="m", model_sha256=sha, engine=engine, precision="fp32", seq_len=seq_len,
        figures=figures, base=figures if base else None,
    )  # fmt: skip


def merge(old, new, *, in_part=False):
    return new.merge(old, in_part=in_part)


class TestMerge:
    def test_both_kinds_stay(self):
        old = make_result(perplexity=["a"], tasks=[("piqa", 0.5)], base=True)
        new = make_result(tasks=[("boolq", 0.7), ("mmlu", 1.0)], seq_len=2048)
        merged = merge(old, new)
        assert list(merged.figures.perplexity) == ["a"]
        assert merged.seq_len == 16  # that of its perplexities
        assert set(merged.figures.tasks) == {"piqa", "boolq", "mmlu"}
        assert merged.figures.average == pytest.approx(0.6)
        assert merged.figures.average_over == ["boolq", "piqa"]
        assert merged.base.tasks == {"piqa": {"acc": 0.5}}
        assert merged.base.average == 0.5

    def test_new_figures_win(self):
        old = make_result(tasks=[("piqa", 0.5)])
        merged = merge(old, make_result(tasks=[("piqa", 0.7)], base=True))
        assert merged.figures.tasks["piqa"]["acc"] == merged.base.tasks["piqa"]["acc"] == 0.7

    def test_perplexities_of_other_segments_go(self):
        old = make_result(perplexity=["a"], tasks=[("piqa", 0.5)])
        merged = merge(old, make_result(perplexity=["b"], seq_len=32))
        assert list(merged.figures.perplexity) == ["b"]
        assert merged.seq_len == 32
        assert list(merged.figures.tasks) == ["piqa"]
        same = merge(old, make_result(perplexity=["b"]))
        assert list(same.figures.perplexity) == ["a", "b"]

    def test_what_the_base_was_measured_on_less_of_goes(self):
        whole = Figures({"a": Perplexity(2.0, 1.0, 10)}, {"piqa": {"acc": 0.5, "n": 9.0}})
        part = Figures({"a": Perplexity(3.0, 1.0, 5)}, {"piqa": {"acc": 0.4, "n": 4.0}})
        old = replace(make_result(), figures=whole, base=whole)
        merged = merge(old, replace(make_result(), figures=part))
        assert merged.figures == part  # the text may be another one now
        assert merged.base is None  # nothing is left of it
        shots = {"piqa": {"acc": 0.5, "n": 9.0, "num_fewshot": 5.0}}
        assert merge(old, replace(make_result(), figures=Figures(tasks=shots))).base.tasks == {}
        assert merge(old, replace(make_result(), figures=whole)).base == whole

    def test_a_quick_look_does_not_replace_the_whole(self):
        whole = Figures({"a": Perplexity(2.0, 1.0, 10)}, {"piqa": {"acc": 0.5, "n": 9.0}})
        part = Figures({"a": Perplexity(3.0, 1.0, 5)}, {"piqa": {"acc": 0.4, "n": 4.0}})
        old = replace(make_result(), figures=whole, base=whole)
        for new in (
            replace(make_result(), figures=part),
            replace(make_result(), figures=part, base=part),
        ):
            merged = merge(old, new, in_part=True)
            assert (merged.figures, merged.base) == (whole, whole)
        # With examples in the prompt it is another measurement.
        shots = Figures(tasks={"piqa": {"acc": 0.4, "n": 4.0, "num_fewshot": 5.0}})
        new = replace(make_result(), figures=shots)
        assert merge(old, new, in_part=True).figures.tasks == shots.tasks

    def test_nothing_of_another_model_stays(self):
        new = make_result(tasks=[("piqa", 0.5)])
        assert merge(make_result(perplexity=["a"], sha="y"), new) == new

    def test_other_engines_stay_beside(self):
        torch, onnx = make_result(perplexity=["a"], base=True), make_result(engine="onnx")
        beside = merge(torch, onnx)
        assert beside == replace(onnx, others=(torch,))
        again = merge(beside, make_result(perplexity=["b"]))
        assert list(again.figures.perplexity) == ["a", "b"]
        assert again.others == (onnx,)

    def test_other_engines_of_another_model_go_too(self):
        both = merge(make_result(perplexity=["a"]), make_result(perplexity=["a"], engine="onnx"))
        new = make_result(perplexity=["a"], sha="y")
        assert merge(both, new) == new

    def test_it_survives_its_file(self):
        torch = make_result(perplexity=["a"], tasks=[("piqa", 0.5)], base=True)
        merged = merge(torch, make_result(engine="onnx", tasks=[("mmlu", 1.0)]))
        data = json.loads(json.dumps(merged.to_json()))
        assert Evaluation.from_json(data) == merged
        assert data["others"][0]["average"] == 0.5
        assert (data["average"], data["average_over"]) == (None, [])
        assert "base" not in data
        del data["others"][0]["engine"]
        with pytest.raises(ValueError, match=r"in others\[0\], engine is missing"):
            Evaluation.from_json(data)


class TestRefusals:
    def test_nothing_to_measure(self):
        with pytest.raises(ValueError, match="Nothing to measure. Give `perplexity`, `tasks`"):
            EvalOptions()

    @pytest.mark.parametrize("option", ["task_data", "num_fewshot", "limit"])
    def test_options_of_tasks_without_tasks(self, option):
        with pytest.raises(ValueError, match=r"needs `tasks`\. Give `tasks` too"):
            EvalOptions(perplexity=("a",), **{option: 1})

    def test_without_lm_eval(self, tmp_path, monkeypatch):
        # With lm_eval gone, and our module that imports it not there yet.
        monkeypatch.delitem(sys.modules, "lpdeploy.evaluation.harness", raising=False)
        monkeypatch.delattr("lpdeploy.evaluation.harness", raising=False)
        find = builtins.__import__

        def refuse(name, *rest):
            if name.partition(".")[0] == "lm_eval":
                raise ModuleNotFoundError(f"No module named '{name}'")
            return find(name, *rest)

        monkeypatch.setattr(builtins, "__import__", refuse)
        with pytest.raises(
            MissingDependencyError,
            match=r"lm-eval is not installed; `tasks` needs it\. Install .*'lpdeploy\[eval\]'",
        ):
            evaluate(str(make_model(tmp_path / "m")), EvalOptions(tasks=("piqa",)), device="cpu")

    def test_base_without_a_run(self, tmp_path):
        with pytest.raises(ArtifactError, match="`with_base=True` needs a run, .* Leave it out"):
            evaluate(str(tmp_path), EvalOptions(tasks=("piqa",)), with_base=True)


def test_of_a_model(tmp_path):
    model, folder = make_model(tmp_path / "m"), make_task_files(tmp_path / "tasks")
    text, told = str(make_text(tmp_path / "t.txt", documents=2)), []
    options = EvalOptions(
        perplexity=(text,), seq_len=32, tasks=("piqa", "arc_easy"), task_data=folder, limit=5
    )
    result = evaluate(str(model), options, device="cpu", on_progress=lambda *now: told.append(now))
    assert set(result.figures.perplexity) == {text}
    assert result.figures.average_over == ["piqa", "arc_easy"]
    accuracies = [result.figures.tasks[name]["acc"] for name in ("piqa", "arc_easy")]
    assert result.figures.average == pytest.approx(sum(accuracies) / 2)
    assert {source for source, *_ in told} == {text, "tasks"}
    done, total = told[-1][1:]
    assert done == total
    with pytest.raises(ArtifactError, match=r"eval\.json"):
        load_json(model / "eval.json", fix="")  # only a run keeps it
