"""What a criterion is: a score, and what has to be observed, stored and sent for it.

No torch is imported here, so that the command line can list the criteria quickly.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ScoredLinear:
    """One Linear as a criterion sees it: it computes with ``W + scaling * lora_b @ lora_a``.

    Attributes:
        lora_a: Shape (rank, in), with its gradient over the batch in ``grad``.
        lora_b: Shape (out, rank), likewise.
        scaling: ``alpha / rank``.
        observed: The gradient of W over the batch, shape (out, in), if the criterion takes
            ``weight_gradients``; the sums of what ``measure_inputs`` returned, shape (in,), if it
            has that; None otherwise.
    """

    lora_a: "Tensor"
    lora_b: "Tensor"
    scaling: float
    observed: "Tensor | None" = None


ScoreRows = Callable[[slice, "Tensor"], "Tensor"]
"""Takes a slice of rows and those rows of ``W + scaling B A``, shape (rows, in), float32, which it
may overwrite. Returns the score of each weight, same shape, before it is squared and summed."""


class ScoreFeatures(Protocol):
    """Scores groups by the features that they contribute to an output projection."""

    def __call__(
        self, hidden: "Tensor", gradient: "Tensor", *, block: int, absolute: bool
    ) -> "Tensor":
        """Score the groups from one micro-batch.

        Args:
            hidden: Input of o_proj or down_proj, shape (B, T, G * block).
            gradient: Gradient of the loss in it, same shape.
            block: Features a group.
            absolute: Sum absolute values instead of squares.

        Returns:
            Shape (G,), float32. It is added up over the micro-batches and the ranks.
        """


class ScoreOutputs(Protocol):
    """Scores the groups of an output projection by what its output would lose."""

    def __call__(self, weight: "Tensor", gram: "Tensor", *, block: int) -> "Tensor":
        """Score the groups of one layer, when some of them are to go.

        Args:
            weight: Of o_proj or down_proj with LoRA merged, shape (out, G * block), float32.
            gram: X'X of its inputs over all calibration tokens, shape (G * block, G * block),
                float32.
            block: Columns a group.

        Returns:
            Shape (G,), float32; comparable within the layer.
        """


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """A way to score groups. It gives exactly one of the four ``score_`` functions.

    What a run needs in memory, sends between ranks and refuses follows from these fields.

    Attributes:
        name: What the option ``criterion`` calls it.
        words: What groups are chosen by; completes "chosen by ..." on cards and pages.
        help: How it scores, for the help of the command line.
        score_weights: Prepares a Linear, and returns what scores its weights row by row. Scores
            are squared (or made absolute) and summed over each group (Eq. 4).
        score_features: Scores groups from the input of their output projection.
        score_groups: Scores a number of groups without looking at them, shape (G,).
        score_outputs: Scores the groups of a layer when some are to go, from rows that run through
            the model layer by layer. Steps observe nothing.
        weight_gradients: Accumulate the gradient of every weight over the batch. This takes a base
            in full precision, whole on every rank, and as much memory again.
        measure_inputs: Takes the input of a Linear, shape (B, T, in), float32, and returns numbers
            of the same shape. Their sums over the real tokens of the batch are observed.
        forward_only: Scores need no gradient, so rows that are only scored run forward alone.
        rank_products: Products of LoRA's rank and a weight's size that scoring takes beside
            ``B A``; counted as operations.
        lora_init: How LoRA starts where the user does not say: ``peft`` or ``groups``.
    """

    name: str
    words: str
    help: str
    score_weights: "Callable[[ScoredLinear], ScoreRows] | None" = None
    score_features: ScoreFeatures | None = None
    score_groups: "Callable[[int], Tensor] | None" = None
    score_outputs: ScoreOutputs | None = None
    weight_gradients: bool = False
    measure_inputs: "Callable[[Tensor], Tensor] | None" = None
    forward_only: bool = False
    rank_products: int = 0
    lora_init: str = "peft"

    def __post_init__(self) -> None:
        given = (self.score_weights, self.score_features, self.score_groups, self.score_outputs)
        if sum(score is not None for score in given) != 1:
            raise ValueError(
                f"criterion '{self.name}' must give exactly one of `score_weights`, "
                "`score_features`, `score_groups` and `score_outputs`"
            )
        observed = (self.weight_gradients, self.measure_inputs is not None)
        if sum(observed) > (self.score_weights is not None):
            raise ValueError(
                f"criterion '{self.name}' may give `weight_gradients` or `measure_inputs`, not "
                "both, and only beside `score_weights`, which sees what was observed"
            )
