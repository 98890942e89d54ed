"""How alike the masks of two criteria are (the paper's Figure 4)."""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lpdeploy.plan import GroupSpec
from lpdeploy.pruning.selection import select_per_layer


@dataclass(frozen=True)
class MaskSimilarity:
    """Two masks of one layer, compared.

    Attributes:
        agreement: Share of the groups that both keep or both remove.
        jaccard: Number of groups that both remove, divided by the number that either removes.
        random_agreement: Expected agreement of two random masks that remove as many groups.
        random_jaccard: Expected Jaccard index of two such masks.
    """

    agreement: float
    jaccard: float
    random_agreement: float
    random_jaccard: float


def compute_mask_similarity(
    first: Tensor, second: Tensor, *, ratio: float
) -> MaskSimilarity | None:
    """Compare the masks that two scores of the same groups give at one ratio.

    Args:
        first: Importance by one criterion, shape (G,).
        second: Importance by the other, shape (G,). Only the order within each counts.
        ratio: Share of groups to remove, to the nearest whole group; at least one stays.

    Returns:
        The comparison, or None if the ratio removes no group.

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
        return None
    both = int((~masks[0] & ~masks[1]).sum())
    return MaskSimilarity(
        agreement=int((masks[0] == masks[1]).sum()) / groups,
        jaccard=both / (2 * removed - both),
        random_agreement=compute_random_agreement(groups, removed),
        random_jaccard=compute_random_jaccard(groups, removed),
    )


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
