"""Wanda: the size of the weights times that of the features they multiply."""

from typing import TYPE_CHECKING

from lpdeploy.criteria.record import Criterion, ScoredLinear, ScoreRows

if TYPE_CHECKING:
    from torch import Tensor


def square(features: "Tensor") -> "Tensor":
    """Square each feature of each token.

    In a step, gradient checkpointing runs each layer twice; twice the sum ranks groups the same.
    """
    return features.square()


def score_weights(linear: ScoredLinear) -> ScoreRows:
    """Multiply each weight by the L2 norm of its input feature over the batch.

    Source:
        Wanda, arXiv:2306.11695, Eq. 1. Wanda compares the weights of one row; a group spans rows,
        so its scores are compared within a layer.
    """
    assert linear.observed is not None
    norms = linear.observed.sqrt()
    return lambda _, weights: weights.mul_(norms)


WANDA = Criterion(
    name="wanda",
    words="the weights times the norms of their inputs",
    help="from the weights times the norms of their inputs",
    score_weights=score_weights,
    measure_inputs=square,
    forward_only=True,
)
