"""What the pruning benchmark runs, in which order, and what it makes of it; no time itself."""

import functools
import json
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from lpdeploy.benchmark import pruning_stage
from lpdeploy.benchmark.plot import draw_pruning, draw_run_costs
from lpdeploy.benchmark.pruning import (
    WARM_UPS,
    PruningWorkload,
    build_result,
    count_flops,
    run_interleaved,
)
from lpdeploy.benchmark.pruning_stage import bench_pruning
from lpdeploy.benchmark.pruning_table import format_pruning, render_pruning
from lpdeploy.benchmark.pruning_worker import (
    Prepared,
    PruningVariant,
    StepCost,
    load_pruning,
    make_loader,
)
from lpdeploy.benchmark.random_models import build_random_model
from lpdeploy.benchmark.worker import Worker
from lpdeploy.config import PruneConfig
from lpdeploy.criteria import CRITERIA
from lpdeploy.errors import LpdeployError
from lpdeploy.models.costs import compute_scoring_flops, compute_training_flops
from lpdeploy.models.loading import load_config
from lpdeploy.models.quantized import get_quantization
from lpdeploy.models.shapes import forecast_config
from lpdeploy.pruning.schedule import Schedule
from tests.helpers import make_text, make_tiny_model

OPTIONS = PruneConfig(batch_size=2, micro_batch_size=1, seq_len=16, round_to=4, device="cpu")
WORKLOAD = PruningWorkload(OPTIONS, steps=3)


class FakeRun:
    def __init__(self, name, order, costs=()):
        self.name, self.order, self.costs = name, order, iter(costs)
        self.described = Prepared("fp32", 1000, 50, 5000)

    def call(self, what):
        assert what == "step"
        self.order.append(self.name)
        return next(self.costs, None)


def make_costs(seconds, *, scoring, peak, cutting=0.5):
    """Warm-ups, three scored steps of which the last cuts, one step after."""
    steps = [StepCost(99.0, 9.0, 0.0, 1, 1, 1.0, 0.0)] * WARM_UPS
    for place, one in enumerate(seconds):
        cut = cutting if place == len(seconds) - 1 else 0.0
        steps.append(StepCost(one + cut, scoring, cut, peak + place, 1, 1.0, 0.0))
    return [*steps, StepCost(0.25, 0.0, 0.0, peak - 400, 1, 1.0, 0.5)]


def test_every_round_steps_all_runs_in_a_changing_order():
    order, rounds = [], []
    runs = [FakeRun(name, order) for name in "abcd"]
    run_interleaved(runs, 20, lambda: rounds.append(len(order)))
    chunks = [order[i : i + 4] for i in range(0, len(order), 4)]
    assert all(sorted(chunk) == list("abcd") for chunk in chunks)
    assert len({tuple(chunk) for chunk in chunks}) > 5
    assert rounds == [4 * (i + 1) for i in range(20)]


def test_the_only_event_comes_after_the_steps_that_count():
    options = PruningWorkload(OPTIONS, steps=5).build_options(criterion="gradient")
    assert options.criterion == "gradient"
    schedule = Schedule(
        ratio=options.ratio, steps=options.steps, every=options.prune_every,
        warmup=options.prune_warmup, cooldown=options.prune_cooldown,
    )  # fmt: skip
    assert schedule.list_events() == [WARM_UPS + 5]
    assert options.steps == WARM_UPS + 5 + 2
    assert options.num_calibration_rows == 0


def make_result():
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4,
    )  # fmt: skip
    lora = WORKLOAD.build_options(criterion="lora")
    gradient = WORKLOAD.build_options(criterion="gradient")
    away = WORKLOAD.build_options(criterion="gradient", offload_gradients=True)
    measured = [
        (lora, Prepared("fp32", 1000, 50, 5000), make_costs([1, 3, 2], scoring=0.1, peak=3048)),
        (gradient, Prepared("fp32", 1000, 50, 9000), make_costs([4, 4, 4], scoring=0.4, peak=5048)),
        (away, Prepared("fp32", 1000, 50, 9000), make_costs([8, 8, 8], scoring=0.4, peak=3048)),
    ]
    return config, build_result(config, WORKLOAD, measured, interleaved=True)


def test_rows_are_medians_without_the_warm_up_and_without_the_cut():
    config, result = make_result()
    lora, gradient, away = result.rows
    assert (lora.step_ms, gradient.step_ms, away.step_ms) == (2000, 4000, 8000)
    assert lora.p10_ms == pytest.approx(1200)  # of 1, 2, 3
    assert lora.p90_ms == pytest.approx(2800)
    assert (lora.scoring_ms, lora.cutting_ms, lora.after_ms) == (100, 500, 250)
    assert lora.total_s == pytest.approx({"training": 5.95, "scoring": 0.3, "cutting": 0.5})
    assert (lora.peak_bytes, lora.after_bytes) == (3050, 2648)
    assert lora.beside_bytes == 3050 - 1000 - 50
    assert lora.tokens_per_s == 16
    assert (lora.relative_time, away.relative_time) == (0.5, 2)
    assert gradient.relative_time == gradient.relative_memory == 1
    assert lora.relative_memory == 3050 / 5050
    assert lora.relative_beside == 2000 / 4000
    assert lora.flops == compute_training_flops(config, tokens=16, batch=2, rank=8) + (
        compute_scoring_flops(config, rank=8, criterion=CRITERIA["lora"])
    )
    assert gradient.flops > lora.flops > lora.after_flops


def test_what_is_left_has_the_widths_that_pruning_leaves():
    config = LlamaConfig(
        hidden_size=64, intermediate_size=172, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=32,
    )  # fmt: skip
    left = forecast_config(config, PruneConfig(ratio=0.5).widths)
    assert (left.num_attention_heads, left.num_key_value_heads) == (4, 2)
    assert left.intermediate_size == 96
    plain = count_flops(config, PruneConfig(criterion="random"))
    checkpointed = count_flops(config, PruneConfig(criterion="random", gradient_checkpointing=True))
    assert checkpointed > 1.2 * plain


def test_without_gradient_nothing_is_relative():
    config, _ = make_result()
    lora = WORKLOAD.build_options()
    unknown = [cost._replace(peak_bytes=None) for cost in make_costs([1] * 3, scoring=0, peak=0)]
    row = build_result(
        config, WORKLOAD, [(lora, Prepared("fp32", 1, 1, 1), unknown)], interleaved=False
    ).rows[0]
    assert row.relative_time is row.relative_memory is row.peak_bytes is None
    assert "one after another" in render_pruning(
        build_result(
            config, WORKLOAD, [(lora, Prepared("fp32", 1, 1, 1), unknown)], interleaved=False
        )
    )


def test_table_and_plot_show_every_variant():
    _, result = make_result()
    lines = format_pruning(result).splitlines()
    assert len(lines) == 4
    assert "0.50" in lines[1]
    text = render_pruning(result)
    assert "| gradient, off-loaded |" in text
    assert "2 rows of 16 tokens a step" in text
    svg = draw_pruning(result)
    for word in ("scoring", "beside them", "off-loaded"):
        assert word in svg
    steps = [{"seconds": 1.0, "peak_bytes": 2e9, "ratio": 0.5}]
    assert "groups removed" in draw_run_costs({"cut": steps, "mask": steps})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("bench") / "m", heads=4, num_hidden_layers=1)


@pytest.mark.slow
def test_a_checkpoint_is_measured_from_end_to_end(base, tmp_path, caplog):
    pytest.importorskip("bitsandbytes")
    caplog.set_level("INFO", logger="lpdeploy")
    seen = []
    result = bench_pruning(
        str(base),
        replace(WORKLOAD, steps=1),
        criteria=("lora", "gradient"),
        load_in=("8bit",),
        output=tmp_path,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    found = [(row.criterion, row.load_in) for row in result.rows]
    assert found == [("lora", None), ("gradient", None), ("lora", "8bit")]
    assert "gradient off-loaded is left out" in caplog.messages[0]
    assert (
        seen[-1][0] == seen[-1][1] == (WARM_UPS + 2) * (1 if "in turn" in caplog.messages[1] else 3)
    )
    assert json.loads((tmp_path / "bench-pruning.json").read_text()) == result.to_json()
    assert (tmp_path / "bench-pruning.svg").read_text().startswith("<?xml")
    assert (tmp_path / "bench-pruning.md").read_text() == render_pruning(result)
    weights = {row.load_in: row.weight_bytes for row in result.rows}
    assert weights[None] == 4 * (2 * 72 * 32 + 3 * 32 + 4 * 32 * 32 + 3 * 32 * 48)
    rows = 4 * 32 + 2 * 48 + 32
    assert weights["8bit"] == 4 * (2 * 72 * 32 + 3 * 32 + rows) + 4 * 32 * 32 + 3 * 32 * 48


@pytest.mark.slow
def test_one_after_another_where_all_at_once_do_not_fit(base, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(pruning_stage, "measure_free_bytes", lambda _: 1000)
    caplog.set_level("INFO", logger="lpdeploy")
    result = bench_pruning(
        str(base), replace(WORKLOAD, steps=1), criteria=("lora", "magnitude"), output=tmp_path,
    )  # fmt: skip
    assert caplog.messages == ["2 runs, one after another"]
    assert not result.workload.interleaved
    assert len(result.rows) == 2


@pytest.mark.slow
def test_a_whole_run_steps_through_its_events_and_is_evaluated(base, tmp_path):
    data = str(make_text(tmp_path / "t.txt"))
    losses = {}
    for removal in ("cut", "mask"):
        options = replace(
            OPTIONS, steps=4, prune_every=1, ramp="authors", removal=removal, lora_dropout=0.0
        )
        described, answer = load_pruning(PruningVariant(base, options, data, valid=data))
        scored = answer("score")
        assert scored.seconds > 0
        costs = [answer("step") for _ in range(4)]
        assert [cost.ratio for cost in costs] == sorted(cost.ratio for cost in costs)
        assert costs[-1].ratio == 0.5
        assert sum(cost.cutting > 0 for cost in costs) == 3
        assert described.weight_bytes > 0
        losses[removal] = [*(cost.loss for cost in costs), answer("evaluate")]
    # float32 sums in another order, amplified by AdamW
    assert losses["cut"] == pytest.approx(losses["mask"], rel=1e-4)


@pytest.mark.slow
def test_a_worker_says_what_does_not_work(base):
    options = replace(OPTIONS, seq_len=4096)
    with pytest.raises(LpdeployError, match="`seq_len` 4096 is longer than the 128 positions"):
        Worker(functools.partial(load_pruning, PruningVariant(base, options, data="nowhere.txt")))


@pytest.mark.parametrize("load_in", [None, "8bit"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_random_weights_have_the_shape_and_run(tmp_path, model_type, load_in):
    if load_in:
        pytest.importorskip("bitsandbytes")
    folder = make_tiny_model(tmp_path / "m", model_type=model_type, kv_heads=2)
    config = load_config(folder)
    model = build_random_model(config, dtype="fp32", device="cpu", load_in=load_in)
    logits = model(torch.arange(12).view(2, 6)).logits
    assert logits.shape == (2, 6, config.vocab_size)
    assert torch.isfinite(logits).all()
    assert get_quantization(model.model.layers[0].mlp.up_proj) == load_in
    assert get_quantization(model.lm_head) is None


def test_random_4bit_weights_are_refused():
    config = LlamaConfig(hidden_size=32, num_attention_heads=4)
    with pytest.raises(ValueError, match="load_in is '4bit'; random weights come in full or in 8"):
        build_random_model(config, dtype="fp32", device="cpu", load_in="4bit")


def test_a_config_alone_gives_random_weights_on_the_device(base):
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=1, intermediate_size=16,
        vocab_size=16,
    )  # fmt: skip
    model = make_loader(config, "cpu")(base, dtype="bf16", device="cuda")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
