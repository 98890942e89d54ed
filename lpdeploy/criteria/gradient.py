"""LLM-Pruner's criterion: the true gradients of the frozen weights."""

from lpdeploy.criteria.record import Criterion, ScoredLinear, ScoreRows


def score_weights(linear: ScoredLinear) -> ScoreRows:
    """Multiply each weight by its gradient, which may be on another device: rows of it move.

    The weight that is removed is W + scaling B A, and its gradient is that of W.

    Source:
        LoRAPrune, arXiv:2305.18403, Eq. 3 (LLM-Pruner, arXiv:2305.11627, first order).
    """
    gradient = linear.observed
    assert gradient is not None
    return lambda rows, weights: weights.mul_(gradient[rows].to(weights.device).float())


GRADIENT = Criterion(
    name="gradient",
    words="the gradients of the weights",
    help="from the gradients of the weights (Eq. 3)",
    score_weights=score_weights,
    weight_gradients=True,
)
