"""Ramps: how pruning is spread over the steps of a run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Ramp:
    """How pruning is spread over a run.

    Attributes:
        warmup: Share of the steps before the first event.
        cooldown: Share of the steps after the last event.
        power: 3 removes many groups early and few late; 1 removes the same number at each event.
        hold: Whether the learning rate stays at its peak until the last event, so that its whole
            decay is left for recovery. Otherwise it falls from the start.
        calibrate: Whether rows are scored before the first step, so that the moving average does
            not start empty.
    """

    warmup: float
    cooldown: float
    power: int
    hold: bool = False
    calibrate: bool = False


RAMPS = {
    "early": Ramp(warmup=0.0, cooldown=0.7, power=3, hold=True, calibrate=True),
    "authors": Ramp(warmup=0.1, cooldown=0.1, power=3),
    "paper": Ramp(warmup=0.0, cooldown=0.0, power=1),
}
"""Name -> ramp. ``early`` leaves most of the steps for recovery, ``authors`` is what the authors'
experiments use, ``paper`` follows Algorithm 1 literally: equal portions every few iterations."""
