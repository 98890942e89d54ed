"""How the model stands after a step: what is left of it, and its loss on text of its own."""

import math
from collections.abc import Callable
from dataclasses import replace

from lpdeploy.data.batches import TokenDataset
from lpdeploy.errors import NonFiniteError
from lpdeploy.families.groups import list_group_specs
from lpdeploy.models.shapes import compute_achieved
from lpdeploy.pruning.log import StepInfo
from lpdeploy.pruning.setup import Source
from lpdeploy.pruning.training import Training
from lpdeploy.pruning.walk import Calibration, collect_calibration, measure_loss

_ROWS = 64
_MEASUREMENTS = 10


def build_monitor(
    source: Source, training: Training, valid: TokenDataset | None
) -> Callable[[StepInfo], StepInfo]:
    """Return what completes each ``StepInfo``, called by every rank right after the step.

    Args:
        source: The unpruned model.
        training: The model as it is.
        valid: Held-out text, whose first ``eval_samples`` rows are evaluated; None for none.
    """
    options = training.options
    specs = list_group_specs(source.config, heads=options.widths.heads)
    rows = None if valid is None else _collect_rows(training, valid)
    every = options.eval_every or max(1, training.steps // _MEASUREMENTS)

    def measure_shares() -> dict[str, float]:
        kept = training.state.list_kept(specs)
        return dict(compute_achieved(source.config, specs, kept))

    achieved = measure_shares()

    def complete(info: StepInfo) -> StepInfo:
        nonlocal achieved
        if info.removed:
            achieved = measure_shares()
        due = info.step % every == 0 or info.step == info.steps
        # What an event left that is not to stand is no state of the run.
        measured = rows is not None and due and training.refused is None
        loss = _measure(training, rows, info.step) if measured and rows else None
        return replace(info, achieved=achieved, valid_loss=loss)

    return complete


def _collect_rows(training: Training, valid: TokenDataset) -> Calibration:
    count = min(len(valid), training.options.eval_samples or _ROWS)
    return collect_calibration(
        valid,
        list(range(count)),
        micro_batch_size=training.options.micro_batch_size,
        autocast=training.autocast,
        ranks=training.ranks,
    )


def _measure(training: Training, rows: Calibration, step: int) -> float:
    loss = measure_loss(training.state.model, rows)
    if not math.isfinite(loss):
        raise NonFiniteError(f"The loss on `valid` became {loss} after step {step}.")
    return loss
