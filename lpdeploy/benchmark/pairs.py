"""The pair of kept counts that loses least and is quick enough, found by few measurements."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lpdeploy.plan import GroupSpec


class Found(NamedTuple):
    """A pair of places in the two lists of counts.

    Attributes:
        heads: Place among the head counts.
        channels: Place among the channel counts.
        loss: Expected of it.
        bound: No pair that is quick enough loses less than this; ``loss`` itself where the search
            came to its end.
    """

    heads: int
    channels: int
    loss: float
    bound: float


def compute_losses(
    importance: Mapping[str, Tensor],
    specs: Sequence[GroupSpec],
    *,
    heads: Sequence[int],
    channels: Sequence[int],
) -> Tensor:
    """Return the expected loss of every pair of kept counts, shape (heads, channels), float64.

    It is the sum of the scores of the groups that would go, the lowest ones of each cluster. Scores
    of different groups are added, as Eq. 4 does within a group: an estimate of what removing them
    together costs, to compare shapes by.

    Args:
        importance: Scores of every spec, shape (G,).
        specs: The groups that may go; all of one kind have as many groups.
        heads: Groups of heads that a layer keeps.
        channels: Channels that a layer keeps.
    """
    lost = {}
    for kind, counts in (("heads", heads), ("channels", channels)):
        family = [spec for spec in specs if spec.kind == kind]
        clusters, num_groups = family[0].clusters, family[0].num_groups
        # As many go of each cluster of a layer, so each of these sums is of one group of each.
        scores = torch.stack([importance[spec.name].double().cpu() for spec in family])
        ascending = scores.unflatten(1, (clusters, -1)).sort(dim=2).values
        sums = ascending.sum(dim=(0, 1)).cumsum(dim=0)  # (layers, clusters, G / clusters)
        sums = torch.cat([torch.zeros(1, dtype=torch.float64), sums])
        lost[kind] = sums[(num_groups - torch.tensor(counts)) // clusters]
    return lost["heads"].unsqueeze(1) + lost["channels"].unsqueeze(0)


def find_pair(losses: Tensor, is_quick: Callable[[int, int], bool], *, budget: int) -> Found:
    """Find the pair of least loss that is quick enough.

    Latency falls with either count, so a pair that is too slow rules out all that keep as much of
    both, and one that is quick enough all that lose as much. Each measurement is of the pair that
    rules out most of what is left, whichever way it turns out.

    Args:
        losses: Of every pair, shape (H, C), for ascending counts. The pair of the largest counts
            is known to be too slow, that of the smallest to be quick enough.
        is_quick: Measures a pair.
        budget: The most measurements.
    """
    last = tuple(size - 1 for size in losses.shape)
    best = (0, 0)
    undecided = losses < losses[best]
    undecided[last] = False
    for _ in range(budget):
        if not undecided.any():
            break
        pair = _choose(losses, undecided)
        if is_quick(*pair):
            best = pair
            undecided &= losses < losses[best]
        else:
            undecided[pair[0] :, pair[1] :] = False
    loss = losses[best].item()
    bound = losses[undecided].min().item() if undecided.any() else loss
    return Found(*best, loss=loss, bound=bound)


def _choose(losses: Tensor, undecided: Tensor) -> tuple[int, int]:
    ascending = losses[undecided].sort().values
    ruled_out_if_quick = len(ascending) - torch.searchsorted(ascending, losses)
    counted = undecided.long().flip(0, 1)
    ruled_out_if_slow = counted.cumsum(dim=0).cumsum(dim=1).flip(0, 1)
    gain = torch.minimum(ruled_out_if_quick, ruled_out_if_slow)
    place = int(gain.masked_fill(~undecided, -1).argmax())
    return divmod(place, losses.shape[1])
