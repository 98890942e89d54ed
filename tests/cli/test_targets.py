"""A target in place of --ratio: what wins over what, and shapes that were measured."""

import itertools
import json
import re
import sys
from contextlib import nullcontext

import pytest
import yaml
from safetensors.torch import load_file

from lpdeploy.benchmark import latency_target
from lpdeploy.benchmark import target as budgets
from lpdeploy.benchmark.target import resolve_options
from lpdeploy.config import PruneConfig
from lpdeploy.errors import LpdeployError
from lpdeploy.plan import HEADS
from lpdeploy.pruning.run import prune as run_prune
from lpdeploy.pruning.target import LatencyFound, TargetRecord, describe_asked
from lpdeploy.run_folder import RunFolder
from tests.cli.test_cli import SMALL, check_refused, invoke, last_json
from tests.helpers import make_text, make_tiny_model, set_launcher
from tests.pruning.test_resume import StoppedError, stop_after


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("targets") / "base", heads=4, kv_heads=2)


@pytest.fixture(scope="module")
def data(base):
    return make_text(base.parent / "text.txt")


def prune(base, data, output, *words):
    return invoke("prune", base, "--data", data, "--output", output, *SMALL, *words)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--target-params", "5K", "--ratio", "0.5"], "--ratio and --target-params each decide"),
        (
            ["--target-params", "5K", "--target-memory", "5kB"],
            "--target-params and --target-memory each",
        ),
        (["--target-params", "5K", "--head-ratio", "0"], "--head-ratio and --target-params"),
        (["--target-latency", "5ms"], "--target-latency needs an engine"),
        (["--engine", "ort"], "--engine belongs to --target-latency; give that too"),
        (["--latency-tokens", "9", "--target-params", "5K"], "--latency-tokens belongs to"),
        (["--target-params", "5X"], "'5X' is not a number of parameters"),
        (
            ["--target-latency", "1ms", "--engine", "torch", "--scope", "global"],
            "use --scope layer or a --ratio",
        ),
    ],
)
def test_wrong_usage_exits_2(base, data, tmp_path, words, sentence):
    check_refused(prune(base, data, tmp_path / "run", *words), re.escape(sentence), code=2)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--target-params", "1B"], "has .* parameters already. Give less"),
        (["--target-memory", "1kB"], "is out of reach: .* Give at least that"),
        (["--target-latency", "1ms", "--engine", "torch", "--latency-tokens", "129"],
         "needs 129 positions; .* has 128. Use --latency-tokens 128 or less"),
        (["--target-latency", "1ms", "--engine", "torch", "--latency-phase", "decode",
          "--latency-tokens", "120"], "Use --latency-tokens 112 or less"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_exits_1(base, data, tmp_path, words, sentence):
    check_refused(prune(base, data, tmp_path / "run", *words), sentence)
    assert not (tmp_path / "run").exists()


def test_a_missing_engine_is_told_before_any_work(base, data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(latency_target, "load_source", lambda *_: pytest.fail("work was done"))
    words = ("--target-latency", "1ms", "--engine", "ort")
    check_refused(prune(base, data, tmp_path / "run", *words), "onnxruntime is not installed")


def test_several_ranks_do_not_measure(base, data, tmp_path, monkeypatch):
    set_launcher(monkeypatch)
    words = ("--target-latency", "1ms", "--engine", "torch")
    check_refused(prune(base, data, tmp_path / "run", *words), "is measured by one process")


def test_a_run_that_would_be_replaced_is_refused_before_any_measurement(base, data, tmp_path):
    RunFolder(tmp_path / "run").claim(clear=True)
    (tmp_path / "run" / "plan.json").write_text("{}")
    words = ("--target-latency", "1ms", "--engine", "torch")
    check_refused(prune(base, data, tmp_path / "run", *words), "already holds a run")


@pytest.mark.slow
def test_what_is_typed_wins_over_what_a_recipe_says(base, data, tmp_path):
    recipe = tmp_path / "recipe.yaml"

    def read(options, *words):
        recipe.write_text(yaml.safe_dump({"prune": options}))
        output = tmp_path / "run"
        words = ("--recipe", recipe, "--overwrite", *words, "--json")
        result = last_json(prune(base, data, output, *words))
        resolved = yaml.safe_load((output / "recipe.yaml").read_text())["prune"]
        return {k: resolved[k] for k in ("ratio", "head_ratio", "channel_ratio")}, result

    target = {"target_params": "0.01M"}
    assert read(target)[1]["ratio"] > 0.5
    assert json.loads((tmp_path / "run" / "target.json").read_text())["asked"] == {
        "parameters": 10_000
    }
    whole = {"ratio": 0.25, "head_ratio": None, "channel_ratio": None}
    assert read(target, "--ratio", "0.25")[0] == whole
    assert not (tmp_path / "run" / "target.json").exists()
    assert read({"head_ratio": 0.5, "channel_ratio": 0.75}, "--ratio", "0.25")[0] == whole
    own = {"ratio": 0.25, "head_ratio": 0.0, "channel_ratio": None}
    assert read({"ratio": 0.25, "target_params": None}, "--head-ratio", "0")[0] == own
    ratios, result = read({"ratio": 0.25, "head_ratio": 0.5}, "--target-params", "10K")
    assert ratios == {"ratio": result["ratio"], "head_ratio": None, "channel_ratio": None}
    recipe.write_text(yaml.safe_dump({"prune": {"ratio": 0.25, **target}}))
    result = prune(base, data, tmp_path / "other", "--recipe", recipe)
    check_refused(result, "--ratio and --target-params each decide", code=2)


@pytest.mark.parametrize(
    ("said", "typed", "expected"),
    [
        ({"heads": "auto"}, ("--head-ratio", "0.5"), (None, 0.5)),
        ({"head_ratio": 0.25}, ("--heads", "auto"), None),
    ],
)
def test_typed_heads_win_over_a_recipe(base, data, tmp_path, said, typed, expected):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"prune": said}))
    words = ("--recipe", recipe, *typed, "--schedule", "one-shot", "--calibration-samples", "4")
    result = prune(base, data, tmp_path / "run", *words)
    assert result.exit_code == 0, result.output
    resolved = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["prune"]
    heads, ratio = resolved["heads"], resolved["head_ratio"]
    if expected is not None:
        assert (heads, ratio) == expected
    else:
        assert heads in HEADS
        assert ratio != 0.25


@pytest.fixture(scope="module")
def worker():
    """One process for all tests: it takes seconds to start."""
    with latency_target._start_worker() as started:
        yield started


@pytest.fixture
def told_times(monkeypatch, worker):
    """Let shapes be timed as they are, then tell their parameters for milliseconds.

    The engines run, and which pair is right does not depend on how busy the machine is.
    """
    times = []

    def time(bench, variants):
        times.extend(measure(bench, variants))
        return [float(variant.parameters) for variant in variants]

    measure = latency_target._Bench._time
    monkeypatch.setattr(latency_target._Bench, "_time", time)
    monkeypatch.setattr(latency_target, "_start_worker", lambda: nullcontext(worker))
    return times


@pytest.fixture(scope="module")
def wide(base):
    """A model whose heads ONNX Runtime's attention takes."""
    return make_tiny_model(base.parent / "wide", heads=8, kv_heads=4, head_dim=16)


def count_parameters(heads, channels):
    """By hand: two layers of hidden 32, two query heads a KV head, heads of 16."""
    layer = (2 * 2 + 2) * heads * 16 * 32 + 3 * channels * 32 + 2 * 32
    return 2 * layer + 2 * 72 * 32 + 32


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "ort"])
def test_a_shape_is_chosen_by_what_was_measured(wide, data, tmp_path, told_times, engine):
    words = ["--target-latency", "20000ms", "--engine", engine, "--latency-tokens", "32"]
    # One-shot, so that the scores that it saves are those of the calibration.
    words += ["--schedule", "one-shot", "--calibration-samples", "4", "--round-to", "8"]
    result = prune(wide, data, tmp_path / "run", *words, "--json")
    assert last_json(result)["achieved"]["parameters"] > 0
    assert "best of those that are fast enough: " in result.stderr
    assert "measured in turn" in result.stderr
    record = json.loads((tmp_path / "run" / "target.json").read_text())
    measured = {(m["kv_heads"], m["channels"]): m["median_ms"] for m in record["measurements"]}
    assert len(told_times) == len(measured) + 2  # each once, and the last two once more
    assert min(told_times) > 0
    assert list(measured)[:2] == [(4, 48), (1, 8)]
    assert measured == {pair: count_parameters(*pair) for pair in measured}
    chosen = (record["kv_heads"], record["channels"])
    assert record["again"] == {
        "dense_ms": count_parameters(4, 48), "chosen_ms": count_parameters(*chosen)
    }  # fmt: skip
    # Nothing larger is quick enough, and of what is, nothing is expected to lose less.
    assert measured[chosen] <= 20_000 < count_parameters(chosen[0], chosen[1] + 8)
    scores = load_file(tmp_path / "run" / "importance.safetensors")

    def lose(heads, channels):
        kept = {"heads": heads, "channels": channels}
        return sum(
            score.sort().values[: len(score) - kept[name.rsplit(".", 1)[1]]].sum().item()
            for name, score in scores.items()
        )

    pairs = itertools.product([1, 2, 3, 4], range(8, 49, 8))
    quick = [pair for pair in pairs if count_parameters(*pair) <= 20_000]
    assert chosen == min(quick, key=lambda pair: lose(*pair))
    assert record["expected_loss"] == pytest.approx(lose(*chosen), rel=1e-5)
    plan = RunFolder(tmp_path / "run").load_plan()
    assert [len(plan.kept[f"layers.1.{kind}"]) for kind in ("heads", "channels")] == [*chosen]


@pytest.fixture(scope="module")
def deep(base):
    return make_tiny_model(base.parent / "deep", heads=4, kv_heads=2, num_hidden_layers=4)


@pytest.mark.slow
def test_dropped_layers_are_gone_from_what_is_measured(deep, data, tmp_path, told_times):
    dense, layer = count_deep(4), count_deep(1) - count_deep(0)
    asked = ["--target-latency", f"{dense - 1.5 * layer:.0f}ms", "--engine", "torch"]
    words = [*asked, "--latency-tokens", "32", "--schedule", "one-shot", "--round-to", "8"]
    words += ["--calibration-samples", "4"]
    result = prune(deep, data, tmp_path / "run", *words, "--drop-layers", "1")
    assert result.exit_code == 0, result.stderr
    record = json.loads((tmp_path / "run" / "target.json").read_text())
    first = record["measurements"][0]
    assert (first["kv_heads"], first["channels"]) == (2, 48)
    assert first["median_ms"] == count_deep(3)
    assert record["again"]["dense_ms"] == dense
    assert record["again"]["chosen_ms"] <= dense - 1.5 * layer
    # Two are enough by themselves.
    result = prune(deep, data, tmp_path / "two", *words, "--drop-layers", "2")
    assert result.exit_code == 0, result.stderr
    record = json.loads((tmp_path / "two" / "target.json").read_text())
    assert record["ratios"] == {"head_ratio": 0.0, "channel_ratio": 0.0}
    assert RunFolder(tmp_path / "two").load_plan().achieved["layers"] == 0.5


@pytest.mark.slow
def test_depth_and_widths_are_chosen_for_a_latency(deep, data, tmp_path, told_times):
    dense, layer = count_deep(4), count_deep(1) - count_deep(0)
    words = ["--target-latency", f"{dense - 1.5 * layer:.0f}ms", "--engine", "torch"]
    words += ["--latency-tokens", "32", "--schedule", "one-shot", "--round-to", "8"]
    words += ["--calibration-samples", "4", "--depth", "auto"]
    result = prune(deep, data, tmp_path / "run", *words)
    assert result.exit_code == 0, result.stderr
    record = json.loads((tmp_path / "run" / "target.json").read_text())
    assert [trial["ratios"]["drop_layers"] for trial in record["trials"]] == [0, 1, 2]
    assert record["asked"]["depth"] == "auto"
    best = min(record["trials"], key=lambda trial: trial["loss"])
    assert record["ratios"] == best["ratios"]
    assert record["again"]["chosen_ms"] <= dense - 1.5 * layer
    plan = RunFolder(tmp_path / "run").load_plan()
    assert len(plan.dropped) == best["ratios"]["drop_layers"]


@pytest.mark.slow
def test_a_kind_of_heads_is_chosen_for_a_latency(wide, data, tmp_path, told_times):
    words = ["--target-latency", "24000ms", "--engine", "torch", "--latency-tokens", "32"]
    words += ["--schedule", "one-shot", "--round-to", "8", "--calibration-samples", "4"]
    result = prune(wide, data, tmp_path / "run", *words, "--heads", "auto")
    assert result.exit_code == 0, result.stderr
    record = json.loads((tmp_path / "run" / "target.json").read_text())
    assert record["asked"]["heads"] == "auto"
    assert {trial["ratios"]["heads"] for trial in record["trials"]} == {"kv-groups", "query-heads"}
    best = min(record["trials"], key=lambda trial: trial["loss"])
    assert record["ratios"] == best["ratios"]
    alone = prune(wide, data, tmp_path / "alone", *words, "--heads", "query-heads")
    assert alone.exit_code == 0, alone.stderr
    record = json.loads((tmp_path / "alone" / "target.json").read_text())
    assert record["kv_heads"] == 4
    assert {m["kv_heads"] for m in record["measurements"]} == {4}
    assert {m["heads"] for m in record["measurements"]} <= {4, 8}
    # Query heads have q_proj and o_proj alone.
    layer = 2 * record["heads"] * 16 * 32 + 2 * 4 * 16 * 32 + 3 * record["channels"] * 32 + 2 * 32
    expected = 2 * layer + 2 * 72 * 32 + 32
    assert record["again"]["chosen_ms"] == expected <= 24_000
    plan = RunFolder(tmp_path / "alone").load_plan()
    kept = [len(plan.kept[f"layers.1.{kind}"]) for kind in ("heads", "channels")]
    assert kept == [record["heads"], record["channels"]]
    assert "of 8 query heads" in alone.stderr


@pytest.mark.slow
def test_a_latency_with_an_open_rate_resumes(wide, data, tmp_path, told_times):
    words = ["--target-latency", "20000ms", "--engine", "torch", "--latency-tokens", "32"]
    words += ["--round-to", "8", "--calibration-samples", "4", "--steps", "12", "--lr", "auto"]
    first = prune(wide, data, tmp_path / "run", *words)
    assert first.exit_code == 0, first.stderr
    (tmp_path / "run" / "plan.json").unlink()  # as if it had not come to its end
    again = prune(wide, data, tmp_path / "run", *words, "--resume")
    assert "another target" not in again.stderr
    assert "as chosen when the run began" in again.stderr


def count_deep(layers):
    """By hand: hidden 32, two KV heads of 8 with two query heads each, FFN 48."""
    layer = (2 * 2 + 2) * 2 * 8 * 32 + 3 * 48 * 32 + 2 * 32
    return layers * layer + 2 * 72 * 32 + 32


@pytest.mark.slow
def test_a_target_outside_of_what_shapes_take_is_refused_with_both_numbers(
    wide, data, tmp_path, told_times
):
    options = {"round_to": 16, "round_heads_to": 2, "seq_len": 16, "protect_first": 1}
    dense = count_parameters(4, 48)
    least = (dense + count_parameters(2, 16)) / 2  # one of two layers is protected

    def resolve(limit, **target):
        config = PruneConfig(
            **options, device="cpu", target_latency=limit, latency_tokens=32, **target
        )
        resolve_options(str(wide), config, data=str(data), output=tmp_path / "r")

    with pytest.raises(LpdeployError) as caught:
        resolve(dense, engine="ort", latency_phase="decode")
    assert str(caught.value) == (
        f"`target_latency` of {dense:g} ms is met already: '{wide}' takes {dense:.3g} ms for a "
        "token after 32 tokens on ort, and its smallest shape (2 of 4 KV heads, 16 of 48 channels) "
        f"takes {least:.3g} ms. Give a target between them, or prune to a `ratio`."
    )
    with pytest.raises(LpdeployError, match="ms is out of reach: .* for a prefill of 32 tokens on"):
        resolve(least - 1, engine="torch")


@pytest.mark.slow
def test_a_resumed_run_measures_nothing_again(base, data, tmp_path, monkeypatch):
    chosen = TargetRecord(
        asked={"latency_ms": 5.0, "engine": "ort", "phase": "prefill", "tokens": 512},
        ratios={"head_ratio": 0.5, "channel_ratio": 0.25},
        found=LatencyFound(2, 1, 12, 0.5, 0.5, "lora", 10, [], {}, {}),
    )
    calls = []

    def choose(model, options, **_):
        calls.append(describe_asked(options))
        return chosen

    monkeypatch.setattr(budgets, "choose_widths", choose)
    words = ("--target-latency", "5ms", "--engine", "ort", "--checkpoint-every", "1")
    run = tmp_path / "run"
    whole = last_json(prune(base, data, tmp_path / "whole", *words, "--json"))
    assert calls == [chosen.asked]
    # As a kill after the third step leaves it.
    options = PruneConfig(
        steps=4, batch_size=2, micro_batch_size=2, seq_len=16, prune_every=1, round_to=4,
        device="cpu", checkpoint_every=1, **chosen.ratios,
    )  # fmt: skip
    with pytest.raises(StoppedError):
        run_prune(
            str(base), run, data=str(data), options=options, target=chosen, on_step=stop_after(3)
        )
    other = prune(base, data, run, *words, "--target-latency", "6ms", "--resume")
    check_refused(other, "began with another target: latency_ms 5.0, engine ort")
    result = prune(base, data, run, *words, "--resume", "--json")
    assert "as chosen when the run began: --head-ratio 0.5 --channel-ratio 0.25" in result.stderr
    assert last_json(result)["achieved"] == whole["achieved"]
    assert len(calls) == 1
    assert whole["achieved"]["heads"] == 0.5
