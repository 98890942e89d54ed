"""Latency of dense and pruned, merged and unmerged models (the paper's Table 3)."""

import functools
import random
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from lpdeploy.benchmark.results import LatencyResult, LatencyRow
from lpdeploy.benchmark.variants import Variant
from lpdeploy.benchmark.worker import Loaded, Timing, Workload
from lpdeploy.errors import LpdeployError
from lpdeploy.machine import describe_machine
from lpdeploy.models.costs import compute_decode_bytes, compute_prefill_flops
from lpdeploy.models.loading import load_config

WARM_UPS = 3
_TAILS = torch.tensor([0.1, 0.9], dtype=torch.float64)
_ITEMSIZE = {"fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class Subject:
    """A variant that is loaded somewhere and can be timed.

    Attributes:
        variant: What it is.
        loaded: What it says of itself.
        time: Runs one trial of a phase.
        config: Of the model; None to read it from the variant's folder.
    """

    variant: Variant
    loaded: Loaded
    time: Callable[[Workload, str], Timing]
    config: PretrainedConfig | None = None


@dataclass(frozen=True)
class Probe:
    """The works that say what the machine can do.

    Attributes:
        units: ``copy``: bytes read and written; ``matrix``: floating-point operations.
        time: Runs one of them.
    """

    units: Mapping[str, float]
    time: Callable[[Workload, str], Timing]


def measure_latency(
    subjects: Sequence[Subject],
    workloads: Sequence[Workload],
    *,
    probe: Probe | None = None,
    phases: Collection[str] = ("prefill", "decode"),
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> LatencyResult:
    """Time all subjects, interleaved: each repeat runs every one of them, in a random order.

    A machine that slows down for a while then slows all alike, and ratios stay true; the probe is
    timed in between as well.

    Raises:
        LpdeployError: A model has fewer positions than a workload needs.
    """
    for workload in workloads:
        for subject in subjects:
            _check_positions(subject, workload)
    jobs = [
        (workload, phase)
        for workload in workloads
        for phase in phases
        if phase == "prefill" or workload.decode
    ]
    progress = _Counter(on_progress, sum(WARM_UPS + workload.repeats for workload, _ in jobs))
    rates: dict[str, list[float]] = {}
    measured = [
        (workload, phase, _time_job(subjects, probe, workload, phase, rates, progress))
        for workload, phase in jobs
    ]
    limits = {work: statistics.median(values) for work, values in rates.items()}
    rows = [
        row
        for workload, phase, timings in measured
        for row in _build_rows(subjects, workload, phase, timings, limits)
    ]
    names = {"copy": "bytes_per_s", "matrix": "flops_per_s"}
    rates_by_name = {names[work]: rate for work, rate in limits.items()}
    return LatencyResult(describe_machine(), rates_by_name, tuple(rows))


def _time_job(
    subjects: Sequence[Subject],
    probe: Probe | None,
    workload: Workload,
    phase: str,
    rates: dict[str, list[float]],
    on_repeat: Callable[[], None],
) -> list[list[Timing]]:
    works = [functools.partial(subject.time, workload, phase) for subject in subjects]
    limit = {"prefill": "matrix", "decode": "copy"}[phase]
    if probe is not None:
        works.append(functools.partial(probe.time, workload, limit))
    timings = time_interleaved(works, workload.repeats, on_repeat)
    if probe is not None:
        units = probe.units[limit]
        rates.setdefault(limit, []).extend(units / timing.seconds for timing in timings.pop())
    return timings


def time_interleaved(
    works: Sequence[Callable[[], Timing]], repeats: int, on_repeat: Callable[[], None]
) -> list[list[Timing]]:
    """Return, for each work, its timing in each repeat; warm-ups do not count."""
    timings: list[list[Timing]] = [[] for _ in works]
    order = list(range(len(works)))
    shuffle = random.Random(0)  # noqa: S311 - an order, no secret
    for repeat in range(-WARM_UPS, repeats):
        shuffle.shuffle(order)
        for index in order:
            timing = works[index]()
            if repeat >= 0:
                timings[index].append(timing)
        on_repeat()
    return timings


def _check_positions(subject: Subject, workload: Workload) -> None:
    needed, limit = workload.tokens + workload.decode, subject.loaded.max_positions
    if needed > limit:
        raise LpdeployError(
            f"`tokens={workload.tokens}` and `decode={workload.decode}` need {needed} positions; "
            f"'{subject.variant.model}' has {limit}. "
            f"Use `tokens={limit - workload.decode}` or less."
        )


def _build_rows(
    subjects: Sequence[Subject],
    workload: Workload,
    phase: str,
    timings: list[list[Timing]],
    limits: Mapping[str, float],
) -> list[LatencyRow]:
    medians = [statistics.median(timing.seconds for timing in own) for own in timings]
    # Of several unpruned models the largest is what the others are smaller than.
    by_size = sorted(zip(subjects, medians, strict=True), key=lambda p: p[0].variant.parameters)
    dense = {
        (subject.variant.engine, subject.loaded.precision): median
        for subject, median in by_size
        if subject.variant.merged and subject.variant.ratio == 0
    }
    return [
        _build_row(
            subject,
            workload,
            phase,
            own,
            reference=dense.get((subject.variant.engine, subject.loaded.precision)),
            limits=limits,
        )
        for subject, own in zip(subjects, timings, strict=True)
    ]


def _build_row(
    subject: Subject,
    workload: Workload,
    phase: str,
    timings: Sequence[Timing],
    *,
    reference: float | None,
    limits: Mapping[str, float],
) -> LatencyRow:
    variant, loaded = subject.variant, subject.loaded
    seconds = [timing.seconds for timing in timings]
    median = statistics.median(seconds)
    p10, p90 = torch.tensor(seconds, dtype=torch.float64).quantile(_TAILS).tolist()
    tokens = workload.batch * (workload.tokens if phase == "prefill" else 1)
    return LatencyRow(
        model=variant.model,
        ratio=variant.ratio,
        engine=variant.engine,
        precision=loaded.precision,
        merged=variant.merged,
        phase=phase,
        tokens=workload.tokens,
        batch=workload.batch,
        median_ms=median * 1e3,
        p10_ms=p10 * 1e3,
        p90_ms=p90 * 1e3,
        tokens_per_s=tokens / median,
        relative=median / reference if reference else None,
        limit_share=_compute_limit_share(subject, workload, phase, median, limits),
        peak_bytes=_sum_bytes(loaded, timings),
        repeats=len(seconds),
        parameters=variant.parameters,
        bytes=variant.bytes,
    )


def _compute_limit_share(
    subject: Subject, workload: Workload, phase: str, seconds: float, limits: Mapping[str, float]
) -> float | None:
    variant, precision = subject.variant, subject.loaded.precision
    config = subject.config or load_config(variant.folder)
    if phase == "prefill" and "matrix" in limits:
        flops = compute_prefill_flops(
            config, tokens=workload.tokens, batch=workload.batch, rank=variant.rank
        )
        return flops / seconds / limits["matrix"]
    if phase == "decode" and "copy" in limits:
        itemsize = _ITEMSIZE.get(precision, 4)
        table = config.vocab_size * config.hidden_size * itemsize
        # The table of embeddings is read whole only where it is the head too.
        shared = config.tie_word_embeddings
        needed = compute_decode_bytes(
            config,
            context=workload.tokens + workload.decode // 2,
            batch=workload.batch,
            weight_bytes=variant.bytes - (0 if shared else table),
            cache_itemsize=itemsize,
        )
        return needed / seconds / limits["copy"]
    return None


def _sum_bytes(loaded: Loaded, timings: Sequence[Timing]) -> int | None:
    taken = [timing.bytes for timing in timings if timing.bytes is not None]
    return loaded.bytes + max(taken) if loaded.bytes is not None and taken else None


class _Counter:
    """Counts repeats over all phases for one progress bar."""

    def __init__(self, report: Callable[[int, int], None], total: int) -> None:
        self._report, self._total, self._done = report, total, 0

    def __call__(self) -> None:
        self._done += 1
        self._report(self._done, self._total)
