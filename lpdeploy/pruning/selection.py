"""Which groups stay: counts that hardware and servers want, and the most important of each."""

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lpdeploy.models.shapes import round_kept, round_spec
from lpdeploy.plan import GroupSpec


def select_per_layer(
    importance: Mapping[str, Tensor],
    specs: Sequence[GroupSpec],
    *,
    ratios: Mapping[str, float],
    multiples: Mapping[str, int],
) -> dict[str, Tensor]:
    """Keep the most important groups, the same share in every layer (Eq. 12).

    The threshold p of Eq. 12 is the score of the best group that goes; equal scores are settled
    by position (the earlier stays), so a selection is always exact and reproducible.

    Args:
        importance: Scores of the groups that are still there, shape (alive,).
        specs: Specs to select from; ``num_groups`` counts the unpruned layer.
        ratios: Share of the unpruned groups that is gone afterwards, by kind.
        multiples: Rounding of the kept count, by kind (``heads``, ``channels``). Clusters of
            groups keep as many each, the best of each.

    Returns:
        Kept positions among those still there, ascending, int64. No regrowth: a spec that has
        fewer groups already keeps all of them.
    """
    kept = {}
    for spec in specs:
        count = round_spec(spec, ratios[spec.kind], multiples=multiples)
        kept[spec.name] = _keep_best(importance[spec.name], count, clusters=spec.clusters)
    return kept


def select_globally(
    importance: Mapping[str, Tensor],
    specs: Sequence[GroupSpec],
    *,
    ratios: Mapping[str, float],
    multiples: Mapping[str, int],
) -> dict[str, Tensor]:
    """Keep the most important groups over all layers, heads and channels each on their own.

    Groups leave in chunks of the rounding multiple, the chunk of least mean importance first, so
    every width stays a multiple, every layer keeps at least one chunk, and the total is within
    one chunk of what ``round_kept`` gives.

    Args and returns as in ``select_per_layer``.
    """
    kept: dict[str, Tensor] = {}
    for kind in sorted({spec.kind for spec in specs}):
        family = [spec for spec in specs if spec.kind == kind]
        kept |= _select_family(importance, family, ratio=ratios[kind], multiple=multiples[kind])
    return kept


def _select_family(
    importance: Mapping[str, Tensor], specs: Sequence[GroupSpec], *, ratio: float, multiple: int
) -> dict[str, Tensor]:
    total = sum(spec.num_groups for spec in specs)
    wanted = round_kept(total, ratio, multiple=multiple)
    counts = {spec.name: len(importance[spec.name]) for spec in specs}
    chunks = sorted(
        chunk for spec in specs for chunk in _list_chunks(spec.name, importance, multiple=multiple)
    )
    for _, name, size in chunks:
        # Chunks of one layer ascend in importance, so they are met in the order they may leave.
        if sum(counts.values()) - size < wanted:
            break
        counts[name] -= size
    return {name: _keep_best(importance[name], count) for name, count in counts.items()}


def _list_chunks(
    name: str, importance: Mapping[str, Tensor], *, multiple: int
) -> list[tuple[float, str, int]]:
    """List (mean importance, name, size) of the chunks that may leave, least important first."""
    ascending = importance[name].sort().values
    first = len(ascending) % multiple  # what is over the last multiple leaves first
    bounds = [0, *range(first or multiple, len(ascending) - multiple + 1, multiple)]
    return [
        (ascending[start:end].mean().item(), name, end - start)
        for start, end in itertools.pairwise(bounds)
    ]


def _keep_best(importance: Tensor, count: int, *, clusters: int = 1) -> Tensor:
    own = importance.view(clusters, -1)  # (alive,) -> (clusters, alive / clusters)
    order = own.sort(descending=True, stable=True).indices
    best = order[:, : count // clusters].sort().values
    first = torch.arange(clusters, device=best.device).unsqueeze(1) * own.shape[1]
    return (first + best).flatten()
