"""A target of latency: shapes are measured on this machine, and the best one is chosen."""

import functools
import logging
import os
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lpdeploy.benchmark.latency import time_interleaved
from lpdeploy.benchmark.pairs import Found, compute_losses, find_pair
from lpdeploy.benchmark.random_models import save_random_model
from lpdeploy.benchmark.trial import use_training
from lpdeploy.benchmark.variants import TimedModel, Variant, build_variant
from lpdeploy.benchmark.worker import Served, Worker, Workload, load_timed
from lpdeploy.config import PruneConfig
from lpdeploy.data.batches import Progress
from lpdeploy.engines import get_engine
from lpdeploy.errors import LpdeployError
from lpdeploy.families.groups import list_layer_specs
from lpdeploy.machine import describe_machine
from lpdeploy.models.loading import PRECISIONS, get_dtype, resolve_device
from lpdeploy.models.shapes import (
    LayerWidths,
    compute_ratios,
    forecast_config,
    forecast_widths,
    list_counts,
)
from lpdeploy.plan import WidthRequest, name_groups
from lpdeploy.pruning.fit import check_memory
from lpdeploy.pruning.importance import Importance
from lpdeploy.pruning.setup import Source, load_dataset, load_source
from lpdeploy.pruning.target import (
    LatencyFound,
    LatencyTarget,
    TargetRecord,
    describe_asked,
    get_latency_target,
)
from lpdeploy.pruning.training import Training, load_event_rows, run_steps
from lpdeploy.run_folder import RunFolder

logger = logging.getLogger(__name__)

# Shapes that are measured at most, the unpruned and the smallest one among them.
_MOST = 20
_REPEATS = 10
_DECODED = 16
_CALIBRATION_ROWS = 128


def choose_widths(
    model: str,
    options: PruneConfig,
    *,
    data: str,
    output: Path | None = None,
    cache: bool = True,
    overwrite: bool = False,
    on_tokenize: Progress | None = None,
) -> TargetRecord:
    """Choose heads and channels of the pruned model separately, by measured latency.

    Args and errors as in ``resolve_options``. Layers that the options drop are gone in every shape
    that is measured.

    Returns:
        The record, with ``head_ratio`` and ``channel_ratio``.

    Raises:
        OutOfReachError: No shape is fast enough.
        MissingDependencyError: The engine is not installed.
        LpdeployError: The target is met already or out of reach, or as ``prune``.
        ValueError: ``options`` ask for no latency, or for an unknown engine.
    """
    target = get_latency_target(options)
    if target is None:
        raise ValueError("`target_latency` and `engine` are needed to choose widths; give both.")
    device = resolve_device(options.device)
    get_engine(target.engine.partition(":")[0]).check(device)
    source = load_source(model, options)
    if output is not None:
        RunFolder(output).check_free(base=source.folder, resume=False, overwrite=overwrite)
    _check_positions(source, target)
    check_memory(source.config, options)
    with (
        tempfile.TemporaryDirectory(prefix="lpdeploy-target-") as scratch,
        _start_worker() as worker,
    ):
        bench = _Bench(source, options, target, device, Path(scratch), worker)
        if bench.check_reachable():
            return bench.finish(bench.whole)
        dataset = load_dataset(source, data, options, cache=cache, on_progress=on_tokenize)
        logger.info("scoring the groups, to know which pair of heads and channels loses least")
        importance = score_groups(source, dataset, options)
        found = bench.search(importance)
        return bench.finish(found)


class OutOfReachError(LpdeployError):
    """A target of latency that no shape meets."""


def build_workload(target: LatencyTarget) -> Workload:
    """Return what is timed."""
    decode = _DECODED if target.phase == "decode" else 0
    return Workload(target.tokens, decode, batch=1, repeats=_REPEATS)


def _describe_target(target: LatencyTarget) -> str:
    what = "a token after" if target.phase == "decode" else "a prefill of"
    return f"{what} {target.tokens} tokens on {target.engine}"


def _check_positions(source: Source, target: LatencyTarget) -> None:
    workload, limit = build_workload(target), source.config.max_position_embeddings
    needed = workload.tokens + workload.decode
    if needed > limit:
        raise LpdeployError(
            f"`latency_tokens` {target.tokens} needs {needed} positions; '{source.name}' has "
            f"{limit}. Use `latency_tokens={limit - workload.decode}` or less."
        )


def score_groups(source: Source, dataset: Any, options: PruneConfig) -> Importance:
    """Score all groups once with the criterion of the run, on the rows of its calibration."""
    rows = options.num_calibration_rows or _CALIBRATION_ROWS
    # Joint, so that nothing is removed behind the calibration.
    options = options.with_ratios(ratio=0.0)
    options = replace(options, schedule="joint", calibration_samples=rows, shard=False)

    def score(training: Training) -> Importance:
        next(run_steps(training))
        training.state.score_outputs(functools.partial(load_event_rows, training, 0))
        return {name: scores.cpu() for name, scores in training.state.average.items()}

    return use_training(source, dataset, options, score)


@contextmanager
def _start_worker() -> Iterator[Worker]:
    """Start the process in which everything is timed, with threads that wait as in ``bench``."""
    before = os.environ.get("OMP_WAIT_POLICY")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    worker = Worker(serve_shapes)
    if before is None:  # this process trains later, where waking the threads would cost more
        del os.environ["OMP_WAIT_POLICY"]
    with worker:
        yield worker


def serve_shapes() -> Served:
    """Load nothing yet; answers variants with the median seconds of each, interleaved."""

    def answer(variants: Sequence[Variant], workload: Workload, phase: str) -> list[float]:
        works = [
            functools.partial(load_timed(variant)[0].time, workload, phase) for variant in variants
        ]
        timings = time_interleaved(works, workload.repeats, lambda: None)
        return [statistics.median(timing.seconds for timing in own) for own in timings]

    return None, answer


@dataclass
class _Bench:
    """Shapes of one model, as they are measured one by one.

    Attributes:
        heads: Counts of groups of heads that a layer may keep, ascending.
        channels: Counts of channels, likewise.
        measurements: All shapes that were measured so far, with their latency.
    """

    source: Source
    options: PruneConfig
    target: LatencyTarget
    device: str
    scratch: Path
    worker: Worker
    measurements: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        widths = self.options.widths
        self.workload = build_workload(self.target)
        self.specs = list_layer_specs(self.source.config, 0, heads=widths.heads)
        self.heads, self.channels = (
            list_counts(spec, multiples=widths.multiples) for spec in self.specs
        )
        self._dense = self._build_variant(TimedModel(self.source.name, self.source.folder), "dense")

    @property
    def whole(self) -> Found:
        """All heads and channels."""
        return Found(len(self.heads) - 1, len(self.channels) - 1, loss=0.0, bound=0.0)

    def check_reachable(self) -> bool:
        """Measure the largest and the smallest shape; refuse a target that is not between them.

        Returns:
            Whether the layers that are dropped are enough.
        """
        whole = self.whole
        dense, least = self._measure(whole.heads, whole.channels), self._measure(0, 0)
        limit = self.target.latency_ms
        if dense <= limit and self.options.drop_layers:
            return True
        if least <= limit < dense:
            return False
        wrong = "is met already" if dense <= limit else "is out of reach"
        raise (LpdeployError if dense <= limit else OutOfReachError)(
            f"`target_latency` of {limit:g} ms {wrong}: '{self.source.name}' takes {dense:.3g} ms "
            f"for {_describe_target(self.target)}, and its smallest shape ({self._describe(0, 0)}) "
            f"takes {least:.3g} ms. Give a target between them, or prune to a `ratio`."
        )

    def search(self, importance: Importance) -> Found:
        """Find the pair of counts that meets the target with the least expected loss."""
        specs = [spec for spec in self.source.prunable if spec.name in importance]  # not dropped
        losses = compute_losses(importance, specs, heads=self.heads, channels=self.channels)

        def is_quick(heads: int, channels: int) -> bool:
            return self._measure(heads, channels) <= self.target.latency_ms

        return find_pair(losses, is_quick, budget=_MOST - len(self.measurements))

    def finish(self, found: Found) -> TargetRecord:
        """Measure the chosen shape once more, interleaved with the unpruned model."""
        pair = (found.heads, found.channels)
        with self._make(*pair) as chosen:
            dense_ms, chosen_ms = self._time([self._dense, chosen])
        width = self._forecast(*pair)
        over = chosen_ms > self.target.latency_ms
        logger.info(
            "best of those that are fast enough: %s, %.3g ms where the unpruned model takes "
            "%.3g ms, measured in turn%s",
            self._describe(*pair),
            chosen_ms,
            dense_ms,
            f": over the target of {self.target.latency_ms:g} ms this time" if over else "",
        )
        ratios = self._compute_ratios(*pair)
        return TargetRecord(
            asked=describe_asked(self.options),
            ratios={"head_ratio": ratios["heads"], "channel_ratio": ratios["channels"]},
            found=LatencyFound(
                **asdict(width),
                expected_loss=found.loss,
                least_possible_loss=found.bound,
                criterion=self.options.criterion,
                repeats=_REPEATS,
                measurements=self.measurements,
                again={"dense_ms": dense_ms, "chosen_ms": chosen_ms},
                machine=describe_machine().to_json(),
            ),
        )

    def _measure(self, heads: int, channels: int) -> float:
        """Measure a shape by itself; milliseconds."""
        with self._make(heads, channels) as variant:
            (median,) = self._time([variant])
        logger.info("measured %s: %.3g ms", self._describe(heads, channels), median)
        width = self._forecast(heads, channels)
        self.measurements.append({**asdict(width), "median_ms": median})
        return median

    def _time(self, variants: list[Variant]) -> list[float]:
        seconds = self.worker.call(variants, self.workload, self.target.phase)
        return [1e3 * each for each in seconds]

    @contextmanager
    def _make(self, heads: int, channels: int) -> Iterator[Variant]:
        """Write a model of random weights of a shape; delete it again."""
        whole = (heads, channels) == (self.whole.heads, self.whole.channels)
        if whole and not self.options.drop_layers:
            yield self._dense
            return
        config = forecast_config(self.source.config, self._request(heads, channels))
        folder = self.scratch / "shape"
        dtype = PRECISIONS[get_dtype(self.source.config)]
        model = save_random_model(config, folder / "model", dtype=dtype)
        yield self._build_variant(TimedModel("shape", model), "shape")
        shutil.rmtree(folder)

    def _build_variant(self, checkpoint: TimedModel, name: str) -> Variant:
        exports = self.scratch / name
        exports.mkdir(exist_ok=True)
        positions = self.workload.tokens + self.workload.decode
        limits = {"max_batch": 1, "max_seq_len": max(2, positions)}
        return build_variant(
            checkpoint,
            engine=self.target.engine,
            device=self.device,
            scratch=exports,
            limits=limits,
        )

    def _compute_ratios(self, heads: int, channels: int) -> dict[str, float]:
        return compute_ratios(self.specs, [self.heads[heads], self.channels[channels]])

    def _request(self, heads: int, channels: int) -> WidthRequest:
        return replace(self.options.widths, ratios=self._compute_ratios(heads, channels))

    def _forecast(self, heads: int, channels: int) -> LayerWidths:
        """Return the widths of a layer that is pruned, and not dropped."""
        widths = forecast_widths(self.source.config, self._request(heads, channels))
        return widths[self.options.protect_first]

    def _describe(self, heads: int, channels: int) -> str:
        count = self.options.drop_layers
        layers = f"{count} {'layer' if count == 1 else 'layers'} dropped, " if count else ""
        counts = (self.heads[heads], self.channels[channels])
        kept = ", ".join(
            f"{count:,} of {spec.num_groups:,} {name_groups(spec)}"
            for spec, count in zip(self.specs, counts, strict=True)
        )
        return layers + kept
