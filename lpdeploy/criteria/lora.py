"""LoRAPrune's own criterion: Eq. 10, from weights and gradients that training has anyway."""

from lpdeploy.criteria.record import Criterion, ScoredLinear, ScoreRows


def score_weights(linear: ScoredLinear) -> ScoreRows:
    """Multiply each weight by its gradient as estimated from LoRA's.

    The estimate ``grad_b A + B grad_a - grad_b grad_a`` is the product of an (out, 2 rank) and a
    (2 rank, in) matrix, so it is formed for the rows at hand and never exists as a whole. The
    scaling belongs to the weight that is removed; the estimate is that of Eq. 9 in PEFT's A and B,
    and a constant factor in it would not change any ranking.

    Raises:
        ValueError: A or B has no gradient.

    Source:
        LoRAPrune, arXiv:2305.18403, Eqs. 9 and 10. The paper squares and sums without normalizing
        a layer, which is the default.
    """
    import torch

    if linear.lora_a.grad is None or linear.lora_b.grad is None:
        raise ValueError("LoRA has no gradients; call backward first")
    grad_a, grad_b = linear.lora_a.grad.float(), linear.lora_b.grad.float()
    left = torch.cat([grad_b, linear.lora_b.detach().float()], dim=1)  # (out, 2R)
    right = torch.cat([linear.lora_a.detach().float() - grad_a, grad_a], dim=0)  # (2R, in)
    return lambda rows, weights: weights.mul_(left[rows] @ right)


LORA = Criterion(
    name="lora",
    words="LoRA's gradients",
    help="from LoRA's gradients (Eq. 10)",
    score_weights=score_weights,
    rank_products=2,
    lora_init="groups",
)
