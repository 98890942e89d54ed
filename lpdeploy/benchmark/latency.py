"""Latency of dense and pruned, merged and unmerged models (the paper's Table 3)."""

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lpdeploy.artifacts import describe_machine
from lpdeploy.benchmark.variants import Variant
from lpdeploy.errors import LpdeployError

WARM_UPS = 3


@dataclass(frozen=True)
class Workload:
    """What is timed.

    Attributes:
        tokens: Prompt tokens of a prefill; the paper times 2,048.
        decode: Tokens decoded one by one after the prompt; 0 for none.
        batch: Rows.
        repeats: Trials of each variant; the paper takes 100.
    """

    tokens: int = 2048
    decode: int = 0
    batch: int = 1
    repeats: int = 100


@dataclass(frozen=True)
class LatencyRow:
    """One variant in one phase; times are of one prefill, or of one decoded token.

    Attributes:
        model: Folder or hub name.
        ratio: Share of groups removed.
        engine: ``torch`` or ``onnx``.
        precision: What it computes in.
        merged: Whether LoRA is merged into the weights.
        phase: ``prefill`` or ``decode``.
        tokens: Prompt tokens.
        batch: Rows.
        median_ms: Median over the repeats.
        p10_ms: 10th percentile.
        p90_ms: 90th percentile.
        tokens_per_s: Tokens of all rows a second, at the median.
        relative: Median over that of the merged dense model on the same engine.
        repeats: Trials.
        parameters: Of the model, adapter included where it is unmerged.
        bytes: Of its weights on disk, likewise.
    """

    model: str
    ratio: float
    engine: str
    precision: str
    merged: bool
    phase: str
    tokens: int
    batch: int
    median_ms: float
    p10_ms: float
    p90_ms: float
    tokens_per_s: float
    relative: float | None
    repeats: int
    parameters: int
    bytes: int


def measure_latency(
    variants: Sequence[Variant],
    workload: Workload,
    *,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, Any]:
    """Time all variants, interleaved: each repeat runs every one of them, in a random order.

    A machine that slows down for a while then slows all alike, and ratios stay true.

    Returns:
        ``{"machine": ..., "rows": [LatencyRow as dict, ...]}``, prefill before decode.

    Raises:
        LpdeployError: A variant has fewer positions than the workload needs.
    """
    for variant in variants:
        _check_positions(variant, workload)
    prompts = [_build_prompt(variant, workload) for variant in variants]
    decode = workload.decode
    total = (WARM_UPS + workload.repeats) * (2 if decode else 1)
    progress = _Counter(on_progress, total)

    def time_prefill(index: int) -> float:
        return _time(lambda: _prefill(variants[index], prompts[index]))

    def time_decode(index: int) -> float:
        return _time_decode(variants[index], prompts[index], steps=decode)

    seconds = time_interleaved(time_prefill, len(variants), workload.repeats, progress)
    rows = _build_rows(variants, workload, seconds, phase="prefill")
    if decode:
        seconds = time_interleaved(time_decode, len(variants), workload.repeats, progress)
        rows += _build_rows(variants, workload, seconds, phase="decode")
    return {"machine": describe_machine(), "rows": [asdict(row) for row in rows]}


def time_interleaved(
    work: Callable[[int], float], count: int, repeats: int, on_repeat: Callable[[], None]
) -> list[list[float]]:
    """Return, for each of ``count`` works, its seconds in each repeat; warm-ups do not count."""
    seconds: list[list[float]] = [[] for _ in range(count)]
    order = list(range(count))
    shuffle = random.Random(0)  # noqa: S311 - an order, no secret
    gc.collect()
    gc.disable()  # a collection in the middle would hit one variant alone
    try:
        for repeat in range(-WARM_UPS, repeats):
            shuffle.shuffle(order)
            for index in order:
                elapsed = work(index)
                if repeat >= 0:
                    seconds[index].append(elapsed)
            on_repeat()
    finally:
        gc.enable()
    return seconds


def _check_positions(variant: Variant, workload: Workload) -> None:
    needed, limit = workload.tokens + workload.decode, variant.runner.max_positions
    if needed > limit:
        raise LpdeployError(
            f"--tokens {workload.tokens} and --decode {workload.decode} need {needed} positions; "
            f"'{variant.model}' has {limit}. Use --tokens {limit - workload.decode} or less."
        )


def _build_prompt(variant: Variant, workload: Workload) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (workload.batch, workload.tokens)
    ids = torch.randint(variant.runner.vocab_size, shape, generator=generator)
    return ids.to(variant.device), torch.ones_like(ids).to(variant.device)


def _prefill(variant: Variant, prompt: tuple[Tensor, Tensor], *, reserve: int = 0) -> Any:
    ids, mask = prompt
    return variant.runner.forward(ids, attention_mask=mask, last_only=True, reserve=reserve)


def _time_decode(variant: Variant, prompt: tuple[Tensor, Tensor], *, steps: int) -> float:
    """Return seconds a decoded token, over ``steps`` of them after an untimed prefill."""
    past = _prefill(variant, prompt, reserve=steps).past
    token = prompt[0][:, -1:]
    mask = torch.cat([prompt[1], torch.ones_like(token).expand(-1, steps)], dim=1)
    length = prompt[1].shape[1]

    def decode() -> None:
        nonlocal past
        for step in range(1, steps + 1):
            output = variant.runner.forward(
                token, attention_mask=mask[:, : length + step], past=past, last_only=True
            )
            past = output.past

    return _time(decode) / steps


def _time(work: Callable[[], Any]) -> float:
    _synchronise()
    start = time.perf_counter()
    work()
    _synchronise()
    return time.perf_counter() - start


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _build_rows(
    variants: Sequence[Variant], workload: Workload, seconds: list[list[float]], *, phase: str
) -> list[LatencyRow]:
    medians = [statistics.median(times) for times in seconds]
    dense = {
        variant.engine: median
        for variant, median in zip(variants, medians, strict=True)
        if variant.merged and variant.ratio == 0
    }
    rows = []
    for variant, times, median in zip(variants, seconds, medians, strict=True):
        p10, p90 = torch.tensor(times).quantile(torch.tensor([0.1, 0.9])).tolist()
        tokens = workload.batch * (workload.tokens if phase == "prefill" else 1)
        reference = dense.get(variant.engine)
        rows.append(
            LatencyRow(
                model=variant.model,
                ratio=variant.ratio,
                engine=variant.engine,
                precision=variant.runner.precision,
                merged=variant.merged,
                phase=phase,
                tokens=workload.tokens,
                batch=workload.batch,
                median_ms=median * 1e3,
                p10_ms=p10 * 1e3,
                p90_ms=p90 * 1e3,
                tokens_per_s=tokens / median,
                relative=median / reference if reference else None,
                repeats=len(times),
                parameters=variant.parameters,
                bytes=variant.bytes,
            )
        )
    return rows


class _Counter:
    """Counts repeats over both phases for one progress bar."""

    def __init__(self, report: Callable[[int, int], None], total: int) -> None:
        self._report, self._total, self._done = report, total, 0

    def __call__(self) -> None:
        self._done += 1
        self._report(self._done, self._total)
