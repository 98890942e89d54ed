"""When groups go and how many, and the learning rate: pure functions of the step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lpdeploy.config import PruneConfig
from lpdeploy.plan import GroupSpec
from lpdeploy.ramps import RAMPS


@dataclass(frozen=True)
class Schedule:
    """Which steps remove groups, and how many are gone after each.

    ``joint`` raises the ratio event by event, between a warm-up and a cool-down.

    Pruning events fall on multiples of ``every`` from the end of the warm-up to the start of the
    cool-down. The paper says "every few iterations" (10 by default, Table 8) and leaves the ratio
    open. The last event lands on ``ratio`` exactly, however the steps divide. In
    ``separate`` and ``one-shot`` the only event comes before the first step (the paper's Table 7).

    Attributes:
        ratio: Share of groups to remove in the end, in [0, 1).
        steps: Optimizer steps of the whole run.
        every: Steps between two pruning events.
        warmup: Share of the steps before the first event.
        cooldown: Share of the steps after the last event.
        power: Exponent of the curve; see ``lpdeploy.config.Ramp``.
        kind: ``joint``, ``separate`` or ``one-shot``.
    """

    ratio: float
    steps: int
    every: int = 10
    warmup: float = 0.1
    cooldown: float = 0.1
    power: int = 3
    kind: str = "joint"

    def list_events(self) -> list[int]:
        """Return the 1-based steps after which groups are removed; 0 is before the first.

        There are none if only whole layers go, unless nothing else happens in the run.
        """
        if not self.ratio and self.kind != "one-shot":
            return []
        if self.kind != "joint":
            return [0]
        first = max(1, math.ceil(self.warmup * self.steps))
        last = max(first, math.floor((1 - self.cooldown) * self.steps))
        events = [step for step in range(self.every, last + 1, self.every) if step >= first]
        return events or [min(last, self.steps)]

    @property
    def last_event(self) -> int:
        """The last of the events; 0 if there is none."""
        return max(self.list_events(), default=0)

    def describe(self) -> str:
        """Say how many events there are, and what their number brings with it."""
        events = self.list_events()
        if not events:
            return "no groups to remove"
        said = f"pruning events: {len(events)}"
        if self.kind != "joint" or len(events) > 1:
            return said
        off = "" if events[0] % self.every == 0 else f", which is no multiple of {self.every}"
        return f"{said}, so that all groups go at once after step {events[0]}{off}"

    def compute_ratio(self, step: int) -> float:
        """Return the share of groups that is gone after 1-based step ``step``."""
        return self.ratio * self.compute_progress(step)

    def compute_progress(self, step: int) -> float:
        """Return the part of what is to go that is gone after 1-based step ``step``.

        With p the place of ``step`` among the events, from 1/n at the first to 1 at the last:
        ``1 - (1 - p) ** power``. Without events, nothing is to go, and all of it is gone.
        """
        events = self.list_events()
        if not events:
            return 1.0
        done = sum(event <= step for event in events)
        return 1 - (1 - done / len(events)) ** self.power


def build_schedule(options: PruneConfig, specs: Sequence[GroupSpec], *, steps: int) -> Schedule:
    """Return which of ``steps`` optimizer steps remove groups.

    Args:
        options: How much is removed, and when.
        specs: The groups that may be removed.
        steps: Optimizer steps of the whole run.
    """
    warmup, cooldown = options.pauses
    return Schedule(
        ratio=options.widths.compute_ratio(specs),
        steps=steps,
        every=options.prune_every,
        warmup=warmup,
        cooldown=cooldown,
        power=RAMPS[options.ramp].power,
        kind=options.schedule,
    )


def compute_learning_rate(
    step: int, *, steps: int, peak: float, warmup_steps: int, hold_steps: int = 0
) -> float:
    """Return the rate of 1-based step ``step``: linear warm-up, peak, then a cosine down to zero.

    Args:
        step: 1-based.
        steps: Of the whole run.
        peak: The highest rate.
        warmup_steps: Steps over which the rate rises to ``peak``.
        hold_steps: Last step that still has the peak; the cosine begins after it.

    Source:
        LoRAPrune, arXiv:2305.18403, section 4.1 (cosine decay); warm-up and hold are ours.
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    start = max(warmup_steps, min(hold_steps, steps))
    progress = max(0, step - 1 - start) / max(1, steps - start)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
