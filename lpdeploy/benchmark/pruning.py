"""What pruning costs by criterion (the paper's Tables 4 and 6): time, memory, operations."""

import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from transformers import PretrainedConfig

from lpdeploy.benchmark.pruning_worker import Prepared, StepCost
from lpdeploy.benchmark.results import PruningResult, PruningRow, PruningSetting
from lpdeploy.config import PruneConfig
from lpdeploy.criteria import CRITERIA
from lpdeploy.machine import describe_machine
from lpdeploy.models.costs import compute_scoring_flops, compute_training_flops
from lpdeploy.models.shapes import forecast_config

WARM_UPS = 1
_TAILS = torch.tensor([0.1, 0.9], dtype=torch.float64)


@dataclass(frozen=True)
class PruningWorkload:
    """What is measured of every variant.

    ``steps`` steps of the whole model, each scored, the last of which removes the share that the
    options name; then half as many of what is left, which are not scored any more.

    Attributes:
        options: Of all variants; criterion, load_in and off-loading differ.
        steps: Steps before the removal that count.
    """

    options: PruneConfig
    steps: int

    @property
    def steps_after(self) -> int:
        """Steps after the removal."""
        return max(1, self.steps // 2)

    def build_options(self, **changes: Any) -> PruneConfig:
        """Return the options of one variant: its only event comes after the counted steps."""
        event = WARM_UPS + self.steps
        fixed: dict[str, Any] = {
            "schedule": "joint",
            "removal": "cut",
            "ramp": "paper",
            "prune_warmup": 0.0,
            "prune_cooldown": 0.0,
            "calibration_samples": 0,
            "prune_every": event,
            "steps": event + self.steps_after,
        }
        return replace(self.options, **fixed, **changes)


class Running(Protocol):
    """A run that takes a step when it is asked for one."""

    described: Prepared

    def call(self, what: str, /) -> StepCost:
        """Take the next step (``step``)."""


def run_interleaved(
    runs: Sequence[Running], rounds: int, on_round: Callable[[], None]
) -> list[list[StepCost]]:
    """Take a step of every run in turn, in an order that changes: what slows one slows all."""
    costs: list[list[StepCost]] = [[] for _ in runs]
    order = list(range(len(runs)))
    shuffle = random.Random(0)  # noqa: S311 - an order, no secret
    for _ in range(rounds):
        shuffle.shuffle(order)
        for index in order:
            costs[index].append(runs[index].call("step"))
        on_round()
    return costs


def build_result(
    config: PretrainedConfig,
    workload: PruningWorkload,
    measured: Iterable[tuple[PruneConfig, Prepared, Sequence[StepCost]]],
    *,
    interleaved: bool,
) -> PruningResult:
    """Make the rows, relative to the criterion that needs the gradients of the weights."""
    rows = [build_row(config, workload, *one) for one in measured]
    reference = next(
        (r for r in rows if CRITERIA[r.criterion].weight_gradients and not r.offload_gradients),
        None,
    )
    if reference is not None:
        rows = [relate(row, reference) for row in rows]
    options = workload.options
    setting = PruningSetting(
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        batch_size=options.batch_size,
        micro_batch_size=options.micro_batch_size,
        seq_len=options.seq_len,
        gradient_checkpointing=options.gradient_checkpointing,
        ratio=options.ratio,
        interleaved=interleaved,
    )
    return PruningResult(describe_machine(), setting, tuple(rows))


def build_row(
    config: PretrainedConfig,
    workload: PruningWorkload,
    options: PruneConfig,
    prepared: Prepared,
    costs: Sequence[StepCost],
) -> PruningRow:
    """Make the row of one variant, not related to any other."""
    event = WARM_UPS + workload.steps
    before, after = costs[WARM_UPS:event], costs[event:]
    # The last of them also cuts, which is not what a step is.
    seconds = [cost.seconds - cost.cutting for cost in before]
    median = statistics.median(seconds)
    p10, p90 = torch.tensor(seconds, dtype=torch.float64).quantile(_TAILS).tolist()
    scoring = [cost.scoring for cost in before]
    peak = _find_peak(costs[:event])
    weights, process = prepared.weight_bytes, prepared.process_bytes
    return PruningRow(
        criterion=options.criterion,
        load_in=options.load_in,
        offload_gradients=options.offload_gradients,
        precision=prepared.precision,
        step_ms=median * 1e3,
        p10_ms=p10 * 1e3,
        p90_ms=p90 * 1e3,
        scoring_ms=statistics.median(scoring) * 1e3,
        cutting_ms=before[-1].cutting * 1e3,
        after_ms=statistics.median(cost.seconds for cost in after) * 1e3,
        tokens_per_s=options.batch_size * options.seq_len / median,
        flops=count_flops(config, options),
        after_flops=count_flops(forecast_config(config, options.widths), options, scored=False),
        total_s={
            "training": sum(seconds) + sum(cost.seconds for cost in after) - sum(scoring),
            "scoring": sum(scoring),
            "cutting": before[-1].cutting,
        },
        peak_bytes=peak,
        after_bytes=_find_peak(after),
        weight_bytes=weights,
        beside_bytes=None if peak is None else peak - process - weights,
        planned_bytes=prepared.planned_bytes,
        relative_time=None,
        relative_memory=None,
        relative_beside=None,
        steps=len(before),
    )


def _find_peak(costs: Iterable[StepCost]) -> int | None:
    known = [cost.peak_bytes for cost in costs if cost.peak_bytes is not None]
    return max(known, default=None)


def relate(row: PruningRow, reference: PruningRow) -> PruningRow:
    """Divide by the reference."""

    def divide(mine: int | None, theirs: int | None) -> float | None:
        return mine / theirs if mine is not None and theirs else None

    return replace(
        row,
        relative_time=row.step_ms / reference.step_ms,
        relative_memory=divide(row.peak_bytes, reference.peak_bytes),
        relative_beside=divide(row.beside_bytes, reference.beside_bytes),
    )


def count_flops(config: PretrainedConfig, options: PruneConfig, *, scored: bool = True) -> float:
    """Count the operations of one step: matrix products of the batch, and scoring."""
    criterion = CRITERIA[options.criterion]
    own = compute_training_flops(
        config,
        tokens=options.seq_len,
        batch=options.batch_size,
        rank=options.lora_rank,
        weight_gradients=scored and criterion.weight_gradients,
        checkpointing=options.gradient_checkpointing,
    )
    scoring = compute_scoring_flops(config, rank=options.lora_rank, criterion=criterion)
    return own + (scoring if scored else 0)
