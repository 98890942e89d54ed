"""The demo, whole, with fewer steps and trials, and a smaller shape to time."""

import html
import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig

from lpdeploy.benchmark.results import LatencyResult
from lpdeploy.demo import timing
from lpdeploy.demo.run import run_demo
from lpdeploy.errors import ArtifactError
from lpdeploy.machine import describe_machine

SMALL = LlamaConfig(
    vocab_size=256, hidden_size=192, intermediate_size=512, num_hidden_layers=1,
    num_attention_heads=12, max_position_embeddings=256, tie_word_embeddings=True,
)  # fmt: skip


@pytest.fixture
def told(monkeypatch):
    """Time a small shape; return a list for what the demo says of its progress."""
    monkeypatch.setattr(timing, "SHAPE", SMALL)
    return []


def test_the_demo_ends_with_a_page_and_true_figures(told, tmp_path):
    output = tmp_path / "demo"
    result = run_demo(output, steps=6, repeats=2, on_progress=lambda *words: told.append(words))
    page = (output / "index.html").read_text()
    # The scatter, heads and channels, loss and groups, torch and onnx.
    assert page.count("<svg") == 7
    assert "Every stage that was compared computes the same." in page
    assert "What the models write" in page
    assert page.count('<tr><th scope="row">') > 20
    assert 1 < result.perplexity["dense"] < result.perplexity["pruned"]
    forms = {(row.engine, row.ratio, row.merged) for row in result.rows}
    assert forms == {
        *(("torch", ratio, merged) for ratio in (0.0, 0.2, 0.5) for merged in (True, False)),
        *(("ort", ratio, True) for ratio in (0.0, 0.2, 0.5)),
    }
    check_what_was_timed(result, page)
    check_progress(told)
    bench = json.loads((output / "pruned-50" / "bench.json").read_text())
    assert bench["note"] == result.note
    (output / "mine.txt").write_text("x")
    with pytest.raises(ArtifactError, match="is not empty"):
        run_demo(output)
    assert (output / "mine.txt").exists()


def check_what_was_timed(result, page):
    """Each variant has the widths of its ratio, and nobody is told that it is the demo's model."""
    # 4 x hidden x heads x 16, 3 x hidden x channels, two norms a layer and one at the end, the
    # table; LoRA of rank 8 has (in + out) x 8 for each of the seven projections.
    counts = {
        (row.ratio, row.merged): row.parameters for row in result.rows if row.engine == "torch"
    }
    for ratio, heads, channels in ((0.0, 12, 512), (0.2, 10, 416), (0.5, 6, 256)):
        dense = 4 * 192 * heads * 16 + 3 * 192 * channels + 3 * 192 + 256 * 192
        assert counts[ratio, True] == dense
        assert counts[ratio, False] == dense + 8 * (
            4 * (192 + heads * 16) + 3 * (192 + channels)
        )  # fmt: skip
    assert "a larger shape with random weights" in result.note
    assert result.note in html.unescape(page)
    assert result.summary.index("random weights") < result.summary.index("merged  ")


def check_progress(told):
    """Every part is begun, and those that can say how far they are reach their end."""
    parts = list(dict.fromkeys(part for part, _, _ in told))
    assert parts == [
        "prune 20%, fine-tune, compact",
        "prune 50%, fine-tune, compact",
        "export to ONNX",
        "verify every stage",
        "evaluate",
        "time a larger shape, dense and pruned, merged and unmerged",
        "generate a few lines",
    ]
    for part in parts:
        assert (part, 0, 0) in told
    for part in (*parts[:2], parts[5]):
        ends = [(done, total) for own, done, total in told if own == part and total]
        assert ends[-1][0] == ends[-1][1] > 0


@pytest.mark.parametrize(("spread", "trials"), [(1.1, [2]), (2.0, [2, 4])])
def test_what_varies_is_timed_once_more(monkeypatch, spread, trials):
    asked = []

    def measure(_, workloads, **__):
        asked.append(workloads[0].repeats)
        rows = (
            SimpleNamespace(p10_ms=1.0, p90_ms=1.0),
            SimpleNamespace(p10_ms=2, p90_ms=2 * spread),
        )
        return LatencyResult(describe_machine(), {}, rows)

    monkeypatch.setattr(timing, "_build_variants", lambda *_: [])
    monkeypatch.setattr(timing, "start_workers", lambda *_, **__: nullcontext(([], None)))
    monkeypatch.setattr(timing, "measure_latency", measure)
    assert "44 million parameters" in timing.time_larger_shape((0.5,), repeats=2).note
    assert asked == trials
