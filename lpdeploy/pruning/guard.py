"""What an event costs: the loss of rows that training has not seen, before and after.

A limit on it ends the pruning with the last good state: the one before the event that cost more.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lpdeploy.errors import LpdeployError
from lpdeploy.pruning.checkpoint import Checkpoint, capture_checkpoint
from lpdeploy.pruning.walk import Calibration, collect_calibration, list_held_out, measure_loss

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
        loss: What the event cost.
        last_good: The state before the event.
    """

    def __init__(self, message: str, loss: EventLoss, last_good: Checkpoint) -> None:
        super().__init__(message)
        self.loss, self.last_good = loss, last_good


def collect_held_out(training: Any, *, count: int = _ROWS) -> Calibration:
    """Load the last held-out rows of a training, and deal them to its ranks."""
    return collect_calibration(
        training.dataset,
        list_held_out(training.dataset, seed=training.options.seed)[-count:],
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
    loss = EventLoss(before, after)
    # A NaN is no more allowed than a large number.
    if last_good is not None and not after - before <= limit:
        raise LossIncreaseError(
            f"The pruning event after step {step} raised the loss of held-out rows from "
            f"{before:.3f} to {after:.3f}, by more than `max_loss_increase` {limit:g}.",
            loss,
            last_good,
        )
    return loss
