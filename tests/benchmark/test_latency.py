"""What the latency benchmark times, in which order, and what it makes of it; no time itself."""

import json

import pytest
import torch

from lpdeploy.benchmark import latency
from lpdeploy.benchmark.latency import WARM_UPS, Workload, measure_latency, time_interleaved
from lpdeploy.benchmark.plot import draw_latency
from lpdeploy.benchmark.stage import bench_latency
from lpdeploy.benchmark.variants import Variant
from lpdeploy.errors import ArtifactError, LpdeployError
from lpdeploy.models.compact import compact
from lpdeploy.pruning.options import PruneOptions
from lpdeploy.pruning.run import prune
from lpdeploy.runtime.runner import Output
from tests.helpers import make_text, make_tiny_model


class FakeRunner:
    """Remembers the shapes it is called with."""

    name, precision, vocab_size, max_positions = "torch", "fp32", 50, 64

    def __init__(self):
        self.calls = []

    def forward(self, input_ids, *, attention_mask, past=None, **_):
        self.calls.append((tuple(input_ids.shape), tuple(attention_mask.shape), past))
        return Output(logits=torch.zeros(1), past=(past or 0) + 1)


def make_variant(*, ratio=0.0, merged=True, engine="torch"):
    return Variant("m", ratio, engine, merged, 100, 400, "cpu", FakeRunner())


def test_every_repeat_runs_all_in_a_changing_order():
    order, ends = [], []

    def work(index):
        order.append(index)
        return float(index)

    seconds = time_interleaved(work, 4, 20, lambda: ends.append(len(order)))
    rounds = [order[i : i + 4] for i in range(0, len(order), 4)]
    assert len(rounds) == 20 + WARM_UPS
    assert all(sorted(one) == [0, 1, 2, 3] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 5
    assert seconds == [[float(index)] * 20 for index in range(4)]
    assert ends == [4 * (i + 1) for i in range(20 + WARM_UPS)]


def test_rows_relate_to_the_merged_dense_model_of_their_engine(monkeypatch):
    variants = [
        make_variant(), make_variant(merged=False), make_variant(ratio=0.5),
        make_variant(engine="onnx", ratio=0.5),
    ]  # fmt: skip
    times = [[0.1, 0.2, 0.3], [0.4] * 3, [0.1] * 3, [0.05] * 3]
    monkeypatch.setattr(latency, "time_interleaved", lambda *_: times)
    rows = measure_latency(variants, Workload(tokens=20, batch=2, repeats=3))["rows"]
    assert [row["relative"] for row in rows] == [1.0, 2.0, 0.5, None]
    assert rows[0]["median_ms"] == pytest.approx(200)
    assert rows[0]["p10_ms"] == pytest.approx(120)
    assert rows[0]["p90_ms"] == pytest.approx(280)
    assert rows[0]["tokens_per_s"] == pytest.approx(2 * 20 / 0.2)
    assert rows[0]["repeats"] == 3


def test_decode_steps_grow_the_cache_one_token_at_a_time():
    variant = make_variant()
    workload = Workload(tokens=5, decode=3, batch=2, repeats=1)
    rows = measure_latency([variant], workload)["rows"]
    assert [row["phase"] for row in rows] == ["prefill", "decode"]
    one_trial = variant.runner.calls[-4:]
    assert one_trial == [
        ((2, 5), (2, 5), None),
        ((2, 1), (2, 6), 1),
        ((2, 1), (2, 7), 2),
        ((2, 1), (2, 8), 3),
    ]


def test_more_tokens_than_positions_are_refused():
    with pytest.raises(LpdeployError, match="need 70 positions; 'm' has 64. Use --tokens 54"):
        measure_latency([make_variant()], Workload(tokens=60, decode=10))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    base = make_tiny_model(folder / "base", heads=4, num_hidden_layers=1)
    options = PruneOptions(
        steps=1, batch_size=2, micro_batch_size=2, seq_len=16, round_to=4, device="cpu"
    )
    prune(str(base), folder / "run", data=str(make_text(folder / "t.txt")), options=options)
    return folder / "run"


def test_a_run_is_timed_dense_and_pruned_merged_and_unmerged(run):
    workload = {"tokens": 8, "decode": 2, "repeats": 2}
    with pytest.raises(ArtifactError, match="to time. Run 'lpdeploy compact .*run' first"):
        bench_latency([str(run)], engines=["torch"], workload=workload, device="cpu")
    compact(run)
    with pytest.raises(ArtifactError, match="Run 'lpdeploy compact .* --keep-adapter' first"):
        bench_latency([str(run)], engines=["torch"], workload=workload, device="cpu")
    compact(run, keep_adapter=True)
    result, folder = bench_latency([str(run)], workload=workload, device="cpu")
    rows = result["rows"]
    found = {(r["engine"], r["ratio"], r["merged"], r["phase"]) for r in rows}
    assert found == {
        (engine, ratio, merged, phase)
        for engine in ("torch", "onnx")
        for ratio in (0.0, 0.5)
        for merged in (True, False)
        for phase in ("prefill", "decode")
    }
    assert len(rows) == len(found)
    by_form = {(r["ratio"], r["merged"]): r for r in rows}
    assert by_form[0.5, True]["parameters"] < by_form[0.0, True]["parameters"]
    assert by_form[0.5, False]["parameters"] > by_form[0.5, True]["parameters"]
    assert by_form[0.5, False]["bytes"] > by_form[0.5, True]["bytes"]
    assert folder == run
    assert json.loads((run / "bench.json").read_text()) == result
    assert (run / "bench.svg").read_text().startswith("<?xml")
    assert result["machine"]["versions"]["torch"]


def test_the_plot_shows_every_bar():
    row = {
        "phase": "prefill", "tokens": 8, "p10_ms": 1.0, "p90_ms": 3.0, "median_ms": 2.0,
    }  # fmt: skip
    rows = [
        {**row, "engine": engine, "ratio": ratio, "merged": merged}
        for engine in ("torch", "onnx")
        for ratio in (0.0, 0.5)
        for merged in (True, False)
    ]
    svg = draw_latency({"rows": rows})
    for text in ("torch", "onnx", "0% pruned", "50% pruned", "LoRA merged", "LoRA unmerged"):
        assert text in svg
