"""What the latency benchmark times, in which order, and what it makes of it; no time itself."""

import functools
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from lpdeploy.benchmark import worker as worker_module
from lpdeploy.benchmark.latency import (
    WARM_UPS,
    Probe,
    Subject,
    measure_latency,
    time_interleaved,
)
from lpdeploy.benchmark.plot import draw_latency, draw_latency_panels, name_models
from lpdeploy.benchmark.results import LatencyResult, LatencyRow
from lpdeploy.benchmark.stage import bench_latency
from lpdeploy.benchmark.table import format_latency, render_latency
from lpdeploy.benchmark.variants import Variant
from lpdeploy.benchmark.worker import Loaded, TimedRunner, Timing, Worker, Workload, load_all
from lpdeploy.config import PruneConfig
from lpdeploy.engines import ONNX
from lpdeploy.engines.runner import Output
from lpdeploy.errors import ArtifactError, LpdeployError
from lpdeploy.machine import describe_machine
from lpdeploy.models.compact import compact
from lpdeploy.models.costs import compute_decode_bytes, compute_prefill_flops
from lpdeploy.models.loading import load_config
from lpdeploy.pruning.run import prune
from tests.helpers import make_text, make_tiny_model


class FakeRunner:
    """Remembers the shapes it is called with."""

    name, precision, vocab_size, max_positions = "torch", "fp32", 50, 64

    def __init__(self):
        self.calls = []

    def forward(self, input_ids, *, attention_mask, past=None, last_only=False, reserve=0):
        assert last_only  # a server wants no other logits
        self.calls.append((tuple(input_ids.shape), tuple(attention_mask.shape), past, reserve))
        return Output(logits=torch.zeros(1), past=(past or 0) + 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model") / "m", heads=4, num_hidden_layers=1)


def make_subject(folder, seconds, *, ratio=0.0, merged=True, engine="torch", parameters=100):
    variant = Variant("m", ratio, engine, merged, parameters, 400_000, "cpu", folder)
    times = iter(seconds)
    return Subject(variant, Loaded("fp32", 64, 1000), lambda *_: Timing(next(times), 50))


def warm(*seconds):
    return [9.0] * WARM_UPS + list(seconds)


def test_every_repeat_runs_all_in_a_changing_order():
    order, ends = [], []

    def make_work(index):
        def work():
            order.append(index)
            return Timing(float(index), None)

        return work

    timings = time_interleaved(
        [make_work(i) for i in range(4)], 20, lambda: ends.append(len(order))
    )
    rounds = [order[i : i + 4] for i in range(0, len(order), 4)]
    assert len(rounds) == 20 + WARM_UPS
    assert all(sorted(one) == [0, 1, 2, 3] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 5
    assert timings == [[Timing(float(index), None)] * 20 for index in range(4)]
    assert ends == [4 * (i + 1) for i in range(20 + WARM_UPS)]


def test_rows_relate_to_the_merged_dense_model_of_their_engine(model):
    subjects = [
        make_subject(model, warm(0.1, 0.2, 0.3)),
        make_subject(model, warm(*[0.4] * 3), merged=False),
        make_subject(model, warm(*[0.1] * 3), ratio=0.5),
        make_subject(model, warm(*[0.05] * 3), engine="onnx", ratio=0.5),
        make_subject(model, warm(*[0.06] * 3), parameters=60),
    ]
    workload = Workload(tokens=20, batch=2, repeats=3)
    rows = measure_latency(subjects, [workload]).rows
    assert [row.relative for row in rows] == pytest.approx([1.0, 2.0, 0.5, None, 0.3])
    assert rows[0].median_ms == pytest.approx(200)
    assert rows[0].p10_ms == pytest.approx(120)
    assert rows[0].p90_ms == pytest.approx(280)
    assert rows[0].tokens_per_s == pytest.approx(2 * 20 / 0.2)
    assert rows[0].repeats == 3
    assert rows[0].peak_bytes == 1050
    assert rows[0].limit_share is None


def test_rows_say_how_near_the_limit_they_are(model):
    probe = Probe(
        {"matrix": 1e6, "copy": 8e6}, lambda _, work: Timing({"matrix": 0.5}.get(work, 2), 0)
    )
    subject = make_subject(model, warm(0.1) * 2)
    workload = Workload(tokens=20, decode=4, batch=3, repeats=1)
    result = measure_latency([subject], [workload], probe=probe)
    assert result.limits == {"flops_per_s": 2e6, "bytes_per_s": 4e6}
    config = load_config(model)
    prefill, decode = result.rows
    flops = compute_prefill_flops(config, tokens=20, batch=3)
    assert prefill.limit_share == pytest.approx(flops / 0.1 / 2e6)
    # The table of embeddings is not read: (72 x 32) float32 of the file's 400,000 bytes.
    weights = 400_000 - 72 * 32 * 4
    needed = compute_decode_bytes(
        config, context=22, batch=3, weight_bytes=weights, cache_itemsize=4
    )
    assert decode.limit_share == pytest.approx(needed / 0.1 / 4e6)


def test_one_trial_has_no_spread(model):
    workload = Workload(tokens=5, repeats=1)
    (row,) = measure_latency([make_subject(model, warm(0.1))], [workload]).rows
    assert row.p10_ms == row.median_ms == row.p90_ms == 100


def test_a_prefill_and_decode_steps_that_grow_the_cache_by_one():
    runner = FakeRunner()
    timed = TimedRunner(runner, device="cpu")
    workload = Workload(tokens=5, decode=3, batch=2)
    timed.time(workload, "prefill")
    assert runner.calls == [((2, 5), (2, 5), None, 0)]
    runner.calls.clear()
    timed.time(workload, "decode")
    assert runner.calls == [
        ((2, 5), (2, 5), None, 3),
        ((2, 1), (2, 6), 1, 0),
        ((2, 1), (2, 7), 2, 0),
        ((2, 1), (2, 8), 3, 0),
    ]


def test_the_memory_of_a_trial_is_what_it_took(monkeypatch):
    held = []
    timing = worker_module.time_work(lambda: held.append(torch.ones(30_000_000)), device="cpu")
    if timing.bytes is None:
        pytest.skip("this system does not tell the peak of a trial")
    assert timing.bytes == pytest.approx(120e6, rel=0.1)
    # Memory that was there before does not count.
    assert worker_module.time_work(lambda: None, device="cpu").bytes < 5e6


GARBAGE = """
import gc
import torch
from lpdeploy.benchmark.worker import time_work

held = []
garbage = [torch.ones(60_000_000)]
garbage.append(garbage)  # only the collector frees what holds itself
del garbage

def work():
    gc.collect()
    held.append(torch.ones(30_000_000))

print(time_work(work, device="cpu").bytes)
"""


def test_garbage_from_before_does_not_hide_the_memory_of_a_trial():
    # In a process of its own: what earlier tests left may be freed at any time.
    done = subprocess.run(
        [sys.executable, "-c", GARBAGE], capture_output=True, text=True, check=True
    )
    if done.stdout.strip() == "None":
        pytest.skip("this system does not tell the peak of a trial")
    assert int(done.stdout) == pytest.approx(120e6, rel=0.1)


def test_more_tokens_than_positions_are_refused(model):
    with pytest.raises(LpdeployError, match="need 70 positions; 'm' has 64. Use `tokens=54`"):
        measure_latency([make_subject(model, [])], [Workload(tokens=60, decode=10)])


@pytest.mark.slow
def test_a_worker_hands_on_what_cannot_be_loaded(tmp_path):
    missing = Variant(
        "m", 0.0, "onnx", True, 1, 1, "cpu", tmp_path, exported=tmp_path, load=ONNX.load
    )
    with pytest.raises(LpdeployError, match=r"No io.json in .*Export it again"):
        Worker(functools.partial(load_all, [missing]))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    base = make_tiny_model(folder / "base", heads=4, num_hidden_layers=1)
    options = PruneConfig(
        steps=1, batch_size=2, micro_batch_size=2, seq_len=16, round_to=4, device="cpu"
    )
    prune(str(base), folder / "run", data=str(make_text(folder / "t.txt")), options=options)
    return folder / "run"


@pytest.mark.slow
def test_a_run_is_timed_dense_and_pruned_merged_and_unmerged(run):
    workloads = [Workload(tokens=8, decode=2, repeats=2)]
    with pytest.raises(ArtifactError, match="Run 'lpdeploy compact .*run' first"):
        bench_latency([str(run)], engines=["torch"], workloads=workloads, device="cpu")
    compact(run)
    with pytest.raises(ArtifactError, match="Run 'lpdeploy compact .* --keep-adapter' first"):
        bench_latency([str(run)], engines=["torch"], workloads=workloads, device="cpu")
    compact(run, keep_adapter=True)
    result, folder = bench_latency([str(run)], engines=["torch"], workloads=workloads, device="cpu")
    rows = result.rows
    found = {(r.engine, r.ratio, r.merged, r.phase) for r in rows}
    assert found == {
        ("torch", ratio, merged, phase)
        for ratio in (0.0, 0.5)
        for merged in (True, False)
        for phase in ("prefill", "decode")
    }
    assert len(rows) == len(found)
    by_form = {(r.ratio, r.merged): r for r in rows}
    assert by_form[0.5, True].parameters < by_form[0.0, True].parameters
    assert by_form[0.5, False].parameters > by_form[0.5, True].parameters
    assert by_form[0.5, False].bytes > by_form[0.5, True].bytes
    assert folder == run
    assert json.loads((run / "bench.json").read_text()) == result.to_json()
    assert (run / "bench.svg").read_text().startswith("<?xml")
    assert (run / "bench.md").read_text() == render_latency(result)
    assert len(format_latency(result).splitlines()) == 1 + len(rows)
    assert all(row.limit_share > 0 for row in rows)
    assert result.machine.versions["torch"]


def test_the_plot_shows_every_bar():
    row = make_row()
    rows = tuple(
        replace(
            row,
            phase=phase,
            engine=engine,
            ratio=ratio,
            merged=merged,
            parameters=6 if ratio else 10,
        )
        for phase in ("prefill", "decode")
        for engine in ("torch", "onnx")
        for ratio in (0.0, 0.5)
        for merged in (True, False)
    )
    bench = LatencyResult(describe_machine(), {}, rows)
    svg, panels = draw_latency(bench), draw_latency_panels(bench)
    assert list(panels) == [
        "torch fp32, prefill of 8 tokens, ms", "onnx fp32, prefill of 8 tokens, ms",
        "torch fp32, decode of a token, ms", "onnx fp32, decode of a token, ms",
    ]  # fmt: skip
    assert all(title in svg for title in panels)
    for picture in (svg, *panels.values()):
        for form in ("LoRA merged", "LoRA unmerged"):
            assert f"dense, {form}" in picture
            assert f"40 % fewer parameters, {form}" in picture


def test_a_bar_is_named_by_the_parameters_that_the_model_has():
    dense = make_row()
    half = replace(dense, ratio=0.5, parameters=6)
    assert name_models([dense, half]) == ["dense", "40 % fewer parameters"]
    # Without the dense model, a share cannot be told.
    assert name_models([replace(half, parameters=2_500_000)]) == ["2.5 M parameters"]


def test_the_spread_of_a_row_is_its_90th_percentile_over_its_10th():
    assert make_row().spread == 3
    assert replace(make_row(), p10_ms=0).spread == 1


def make_row():
    return LatencyRow(
        model="m", ratio=0, engine="torch", precision="fp32", merged=True, phase="decode",
        tokens=8, batch=1, median_ms=2, p10_ms=1, p90_ms=3, tokens_per_s=500, relative=1,
        limit_share=None, peak_bytes=None, repeats=3, parameters=10, bytes=40,
    )  # fmt: skip
