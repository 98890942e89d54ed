"""What a run of ``prune`` would do, found out without loading a weight."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lpdeploy.benchmark.limits import LimitsProbe
from lpdeploy.benchmark.worker import time_work
from lpdeploy.config import PruneConfig
from lpdeploy.criteria import CRITERIA
from lpdeploy.data.batches import Progress, TokenDataset
from lpdeploy.models.costs import compute_prefill_flops, compute_training_flops
from lpdeploy.models.loading import resolve_device, resolve_dtype
from lpdeploy.models.shapes import (
    count_kept,
    count_parameters,
    forecast_config,
    list_projections,
    list_widths,
)
from lpdeploy.plan import name_groups
from lpdeploy.pruning.depth import CANDIDATES, DEPTH_ROWS
from lpdeploy.pruning.fit import check_memory
from lpdeploy.pruning.refit import count_refit_rows
from lpdeploy.pruning.schedule import build_schedule
from lpdeploy.pruning.setup import Source, check_refit_data, load_dataset, load_source
from lpdeploy.pruning.training import count_steps
from lpdeploy.run_folder import RunFolder

_TRIALS = 3


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What a run would do.

    Attributes:
        model: Folder or hub name of the base.
        rows: Rows of tokens to train on.
        dropped: Examples that give no row.
        cut: Rows that lack the end of an answer.
        steps: Optimizer steps.
        passes: Times that training sees each row.
        events: The steps after which groups go; empty where trials choose the shape first.
        layers: Layers that would be kept, and those that the base has; None where trials choose.
        kept: Groups that a layer keeps, and those that it has, by their name: on average over the
            layers with ``scope='global'``; None where trials choose the shape first.
        parameters: Of the base (``before``) and of the pruned model (``after``); None for the
            latter where trials or scores decide.
        planned_bytes: Memory by its parts, and their total.
        least_seconds: Of the matrix products of the run, at the speed that a product has on this
            device now: choosing layers, scores, refits and training. Everything else comes on top,
            and so do trials and the predictions of a teacher.
    """

    model: str
    rows: int
    dropped: int
    cut: int
    steps: int
    passes: float
    events: tuple[int, ...]
    layers: tuple[int, int] | None
    kept: dict[str, tuple[int, int]] | None
    parameters: dict[str, int | None]
    planned_bytes: dict[str, int]
    least_seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return what ``prune --dry-run --json`` prints."""
        return asdict(self)


def dry_run(  # noqa: PLR0913 - what prune takes
    model: str,
    options: PruneConfig,
    *,
    data: str,
    valid: str | None = None,
    output: Path,
    cache: bool = True,
    overwrite: bool = False,
    on_tokenize: Progress | None = None,
) -> DryRun:
    """Check a run, and say what it would do. Nothing is written but tokens, for the run itself.

    Args:
        model: Hugging Face folder or hub name.
        options: How to prune.
        data: File, folder or hub name.
        valid: Likewise, to measure the loss on; None for none.
        output: The run folder to be.
        cache: Keep the tokens of ``data``, and use those of an earlier run.
        overwrite: Whether a run in ``output`` may be replaced.
        on_tokenize: Is told (examples tokenized, all examples).

    Raises:
        LpdeployError: The run could not start: as ``prune``.
    """
    source = load_source(model, options)
    RunFolder(output).check_free(base=source.folder, resume=False, overwrite=overwrite)
    memory = check_memory(source.config, options)
    dataset = load_dataset(source, data, options, cache=cache, on_progress=on_tokenize)
    if valid is not None:
        load_dataset(source, valid, options, split="test", cache=cache, on_progress=on_tokenize)
    known = not options.has_open_shape
    if known:
        check_refit_data(source, dataset, options)
    steps = count_steps(options, len(dataset))
    schedule = build_schedule(options, source.prunable, steps=steps) if known else None
    events = () if schedule is None else tuple(schedule.list_events())
    return DryRun(
        model=model,
        rows=len(dataset),
        dropped=dataset.num_dropped,
        cut=dataset.num_cut,
        steps=steps,
        passes=steps * options.batch_size / len(dataset),
        events=events,
        layers=_count_layers(source, options) if known else None,
        kept=_count_groups(source, options) if known else None,
        parameters={
            "before": count_parameters(source.config),
            "after": count_parameters(forecast_config(source.config, options.widths))
            if known and options.scope == "layer"
            else None,
        },
        planned_bytes=memory.to_json(),
        least_seconds=_compute_least_seconds(
            source, dataset, options, steps=steps, events=len(events)
        ),
    )


def _count_layers(source: Source, options: PruneConfig) -> tuple[int, int]:
    layers = source.config.num_hidden_layers
    return layers - (options.drop_layers or 0), layers


def _count_groups(source: Source, options: PruneConfig) -> dict[str, tuple[int, int]]:
    counts = count_kept(source.config, options.widths)
    return {name_groups(spec): (counts[spec.kind], spec.num_groups) for spec in source.prunable[:2]}


def _compute_least_seconds(
    source: Source, dataset: TokenDataset, options: PruneConfig, *, steps: int, events: int
) -> float:
    row = _count_row(source, dataset, options)
    flops = steps * options.batch_size * row
    flops += _count_preparation(source, dataset, options, row=row, events=events)
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, source.config, device=device)
    return flops / _measure_products(device, dtype)


def _count_row(source: Source, dataset: TokenDataset, options: PruneConfig) -> float:
    """Count the operations that training on one row takes."""
    return compute_training_flops(
        source.config,
        tokens=round(float(dataset.lengths.mean())),
        batch=1,
        rank=options.lora_rank,
        weight_gradients=CRITERIA[options.criterion].weight_gradients,
        checkpointing=options.gradient_checkpointing,
    )


def _count_preparation(
    source: Source, dataset: TokenDataset, options: PruneConfig, *, row: float, events: int
) -> float:
    """Count the operations of choosing layers, of scores before the first step, and of refits."""
    length = round(float(dataset.lengths.mean()))
    forward = compute_prefill_flops(source.config, tokens=length, batch=1)
    forward_only = CRITERIA[options.criterion].forward_only
    total = options.num_calibration_rows * (forward if forward_only else row)
    dropped = options.drop_layers or 0
    # A candidate runs through the layers behind it, half of them on average.
    total += dropped * CANDIDATES * DEPTH_ROWS * forward / 2
    refits = options.runs_rows_at_events * events + bool(dropped and options.refit)
    if refits:
        columns = [
            list_projections(source.config, width)[place][0]
            for width in list_widths(source.config)
            for place in (3, 6)  # o_proj and down_proj
        ]
        rows = count_refit_rows(options, dataset.lengths, columns=max(columns))
        # Two streams of hidden states, and half of each X'X, which is symmetric.
        total += refits * rows * (2 * forward + length * sum(n * n for n in columns))
    return total


def _measure_products(device: str, precision: str) -> float:
    """Return the floating-point operations a second of a large product, at best of a few."""
    probe = LimitsProbe(device=device, precision=precision)
    times = [
        time_work(lambda: probe.run("matrix"), device=device).seconds for _ in range(_TRIALS + 1)
    ]
    return probe.units["matrix"] / min(times[1:])  # the first one warms up
