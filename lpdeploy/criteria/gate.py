"""What a gate of one before each group would feel: the exact first order of its removal."""

from typing import TYPE_CHECKING

from lpdeploy.criteria.record import Criterion

if TYPE_CHECKING:
    from torch import Tensor


def score_features(hidden: "Tensor", gradient: "Tensor", *, block: int, absolute: bool) -> "Tensor":
    """Score each group by the Fisher information of its gate; see ``ScoreFeatures``.

    With h the input of o_proj or down_proj, multiplying a group's part of h by a gate z = 1 gives
    dL/dz = sum of h * dL/dh over the group and the tokens. Its square, per sample, summed over
    the batch, is the empirical Fisher information of z. It needs no gradient of a weight and no
    approximation by LoRA, only what the backward pass computes anyway.
    """
    product = hidden.float() * gradient.float()
    gates = product.sum(dim=1).unflatten(1, (-1, block)).sum(dim=2)  # (B, T, G*block) -> (B, G)
    scores = gates.abs() if absolute else gates.square()
    return scores.sum(dim=0)  # (B, G) -> (G,)


GATE = Criterion(
    name="gate",
    words="the gradients of a gate on each group",
    help="from the Fisher information of a gate on each group",
    score_features=score_features,
)
