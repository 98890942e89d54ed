"""The size of the weights, LoRA's update included."""

from lpdeploy.criteria.record import Criterion, ScoredLinear, ScoreRows


def score_weights(_: ScoredLinear) -> ScoreRows:
    """Score each weight by itself."""
    return lambda _, weights: weights


MAGNITUDE = Criterion(
    name="magnitude",
    words="the magnitude of the weights",
    help="from the weights",
    score_weights=score_weights,
    forward_only=True,
)
