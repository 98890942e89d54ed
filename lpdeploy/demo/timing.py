"""The demo's timing: a shape that is large enough to show what pruning gains, of random weights."""

import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from transformers import LlamaConfig, PretrainedConfig

from lpdeploy.benchmark.latency import measure_latency
from lpdeploy.benchmark.random_models import (
    build_random_model,
    save_random_adapter,
    save_random_model,
)
from lpdeploy.benchmark.results import LatencyResult
from lpdeploy.benchmark.stage import start_workers
from lpdeploy.benchmark.variants import TimedModel, Variant, build_variant
from lpdeploy.benchmark.worker import Workload
from lpdeploy.models.loading import load_config
from lpdeploy.models.shapes import count_parameters, forecast_config
from lpdeploy.plan import WidthRequest
from lpdeploy.run_folder import ADAPTER

logger = logging.getLogger(__name__)

# The widths of a LLaMA of about 100 M parameters, with half of its layers: all layers take the
# same time.
SHAPE = LlamaConfig(
    vocab_size=2048,
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=6,
    num_attention_heads=12,
    max_position_embeddings=512,
    tie_word_embeddings=True,
)
_MULTIPLES = {"heads": 1, "channels": 32}  # as prune rounds by default
_RANK, _ALPHA = 8, 16.0
_TOKENS = 256
_WIDE_SPREAD = 1.3  # of the 90th over the 10th percentile; on an idle machine it is below 1.1
_MORE = 2


def time_larger_shape(
    ratios: Sequence[float],
    *,
    repeats: int,
    engines: Sequence[str] = ("torch", "ort"),
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> LatencyResult:
    """Time the shape unpruned and pruned, merged and unmerged, with torch and ONNX Runtime.

    Where the times of a variant vary much, all are timed once more, with more trials.

    Args:
        ratios: Shares of heads and channels to remove.
        repeats: Number of trials of each variant.
        engines: What runs them. How a separate adapter slows a model down is seen on the first.
        on_progress: Is told (repeats done, all repeats).

    Returns:
        The result. Its note says what was timed.
    """
    with tempfile.TemporaryDirectory(prefix="lpdeploy-demo-") as scratch:
        variants = _build_variants((0.0, *ratios), engines, Path(scratch))
        with start_workers(variants, device="cpu") as (subjects, probe):

            def measure(trials: int) -> LatencyResult:
                work = Workload(tokens=_TOKENS, repeats=trials)
                return measure_latency(subjects, [work], probe=probe, on_progress=on_progress)

            result = measure(repeats)
            if _compute_spread(result) > _WIDE_SPREAD:
                more = _MORE * repeats
                logger.info("the machine is not idle, so times vary: %d trials more of each", more)
                result = measure(more)
    return replace(result, note=_describe())


def _build_variants(
    ratios: Sequence[float], engines: Sequence[str], scratch: Path
) -> list[Variant]:
    models = [_save_model(ratio, scratch / f"model-{index}") for index, ratio in enumerate(ratios)]
    limits = {"max_batch": 1, "max_seq_len": _TOKENS}
    return [
        build_variant(model, engine=engine, device="cpu", scratch=scratch, limits=limits)
        for engine in engines
        for merged in models
        for model in ((merged, _add_adapter(merged)) if engine == engines[0] else (merged,))
    ]


def _save_model(ratio: float, folder: Path) -> TimedModel:
    config = _cut(ratio)
    return TimedModel(f"{count_parameters(config):,}", save_random_model(config, folder), ratio)


def _cut(ratio: float) -> PretrainedConfig:
    ratios = dict.fromkeys(_MULTIPLES, ratio)
    return forecast_config(SHAPE, WidthRequest(ratios, _MULTIPLES))


def _add_adapter(model: TimedModel) -> TimedModel:
    live = build_random_model(load_config(model.folder), dtype="fp32", device="cpu")
    folder = model.folder / ADAPTER
    save_random_adapter(live, folder, rank=_RANK, alpha=_ALPHA)
    return replace(model, adapter=folder)


def _compute_spread(result: LatencyResult) -> float:
    return max(row.p90_ms / row.p10_ms for row in result.rows)


def _describe() -> str:
    return (
        f"Timed on a larger shape with random weights, {count_parameters(SHAPE) / 1e6:.0f} million "
        "parameters before pruning, of which the same shares of heads and channels were removed. "
        "Time depends on the shape, not on the values of the weights; the demo's own model is so "
        "small that most of its time is spent beside the work that pruning removes."
    )
