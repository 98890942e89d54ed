"""What an event costs: the loss of rows that training has not seen, before and after.

A limit on it ends the pruning with the last good state: the one before the event that cost more.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lpdeploy.data.batches import TokenDataset, list_batch
from lpdeploy.errors import LpdeployError
from lpdeploy.pruning.checkpoint import Checkpoint, capture_checkpoint
from lpdeploy.pruning.walk import Calibration, collect_calibration, measure_loss

_ROWS = 16


@dataclass(frozen=True)
class EventLoss:
    """Mean loss of held-out rows around an event, in nats a token.

    Attributes:
        before: With the groups that the event removes.
        after: Without them.
    """

    before: float
    after: float


class LossIncreaseError(LpdeployError):
    """An event raised the loss by more than was allowed.

    Attributes:
        last_good: The state before the event.
    """

    def __init__(self, message: str, last_good: Checkpoint) -> None:
        super().__init__(message)
        self.last_good = last_good


def list_held_out(dataset: TokenDataset, *, seed: int, count: int = _ROWS) -> list[int]:
    """List the rows that training comes to last: a first pass over the data ends with them.

    Args:
        dataset: Tokens.
        seed: Of the run.
        count: How many rows; all there are if they are fewer.
    """
    size = min(count, len(dataset))
    last = len(dataset) // size - 1
    return list_batch(len(dataset), step=last, batch_size=size, seed=seed)


def collect_held_out(training: Any, *, count: int = _ROWS) -> Calibration:
    """Load the held-out rows of a training, and deal them to its ranks."""
    return collect_calibration(
        training.dataset,
        list_held_out(training.dataset, seed=training.options.seed, count=count),
        micro_batch_size=training.options.micro_batch_size,
        autocast=training.autocast,
        ranks=training.ranks,
    )


def watch_event(training: Any, step: int, remove: Callable[[], None]) -> EventLoss:
    """Remove groups between two measurements, and compare them.

    Args:
        training: The model as it is now.
        step: After which the groups go.
        remove: Removes them.

    Raises:
        LossIncreaseError: The loss rose by more than ``max_loss_increase``. Without that option,
            it may rise by any amount.
    """
    limit, model = training.options.max_loss_increase, training.state.model
    rows = collect_held_out(training)
    last_good = None if limit is None else capture_checkpoint(training, step)
    before = measure_loss(model, rows)
    remove()
    after = measure_loss(model, rows)
    # A NaN is no more allowed than a large number.
    if last_good is not None and not after - before <= limit:
        raise LossIncreaseError(
            f"The pruning event after step {step} raised the loss of held-out rows from "
            f"{before:.3f} to {after:.3f}, by more than `max_loss_increase` {limit:g}.",
            last_good,
        )
    return EventLoss(before, after)
