"""How alike the masks of two criteria are (the paper's Figure 4)."""

import functools
import math

import torch
from torch import Tensor

from lpdeploy.plan import GroupSpec
from lpdeploy.pruning.selection import select_per_layer


def compute_mask_similarity(first: Tensor, second: Tensor, *, ratio: float) -> dict[str, float]:
    """Compare the masks that two scores of the same groups give at one ratio.

    Args:
        first: Importance by one criterion, shape (G,).
        second: Importance by the other, shape (G,). Only the order within each counts.
        ratio: Share of groups to remove, to the nearest whole group; at least one stays.

    Returns:
        By column: ``agreement``, the share of groups that both masks keep or both remove;
        ``Jaccard``, the number of groups that both remove divided by the number that either
        removes; and the values expected of two random masks that remove as many groups. Empty
        if the ratio removes no group.

    Raises:
        ValueError: The shapes differ.

    Source:
        LoRAPrune, arXiv:2305.18403, section 4.3 and Figure 4, which shows the agreement. The
        Jaccard index is ours: at a low ratio even two random masks agree on most groups.
    """
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(
            f"scores of shapes {tuple(first.shape)} and {tuple(second.shape)} are not of the same "
            "groups; give two of shape (G,)"
        )
    groups = len(first)
    masks = [_build_mask(scores, ratio) for scores in (first, second)]
    removed = groups - int(masks[0].sum())
    if removed == 0:
        return {}
    both = int((~masks[0] & ~masks[1]).sum())
    return {
        "agreement": int((masks[0] == masks[1]).sum()) / groups,
        "random agreement": compute_random_agreement(groups, removed),
        "Jaccard": both / (2 * removed - both),
        "random Jaccard": compute_random_jaccard(groups, removed),
    }


def _build_mask(scores: Tensor, ratio: float) -> Tensor:
    """Return what pruning itself would keep, shape (G,), True = kept."""
    spec = GroupSpec("layers.0.channels", len(scores), ())
    kept = select_per_layer(
        {spec.name: scores}, [spec], ratios={"channels": ratio}, multiples={"channels": 1}
    )
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[kept[spec.name]] = True
    return mask


def compute_random_agreement(groups: int, removed: int) -> float:
    """Return the expected agreement of two masks that remove ``removed`` groups at random.

    A group is removed by both with probability (k/G)^2 and kept by both with (1 - k/G)^2.
    """
    share = removed / groups
    return share**2 + (1 - share) ** 2


@functools.cache
def compute_random_jaccard(groups: int, removed: int) -> float:
    """Return the expected Jaccard index of two masks that remove ``removed`` groups at random.

    The number o of groups that both remove is hypergeometric, and the index is o / (2 k - o).
    """
    total = _log_choose(groups, removed)
    return math.fsum(
        math.exp(_log_choose(removed, both) + _log_choose(groups - removed, removed - both) - total)
        * both
        / (2 * removed - both)
        for both in range(max(0, 2 * removed - groups), removed + 1)
    )


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
