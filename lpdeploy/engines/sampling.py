"""What is asked of the choice of the next token. Standard library only."""

from dataclasses import dataclass

_TEMPERATURES = (1e-3, 1e3)
"""Beyond these, logits divided by the temperature are all alike, or no numbers."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the names and meanings are those of transformers.

    Attributes:
        temperature: 0 takes the most likely token.
        top_k: Choose among so many of the most likely; 0 for all.
        top_p: Choose among the most likely that together have this probability.
        seed: Of the draws; None for a new one each time.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        low, high = _TEMPERATURES
        if not (self.temperature == 0 or low <= self.temperature <= high):
            raise ValueError(
                f"temperature is {self.temperature}; it must be 0 (greedy), or {low:g} to {high:g}"
            )
        if not (_is_whole(self.top_k) and self.top_k >= 0):
            raise ValueError(f"top_k is {self.top_k}; it must be a whole number, 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.seed is not None and not (_is_whole(self.seed) and 0 <= self.seed < 2**63):
            raise ValueError(f"seed is {self.seed}; it must be a whole number from 0, below 2**63")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
