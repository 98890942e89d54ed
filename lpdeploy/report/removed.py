"""What was removed: a map of layers by groups, with the importance of each group."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lpdeploy.errors import ArtifactError, quote_error
from lpdeploy.plan import GroupSpec, PruningPlan, name_groups

MOST_CELLS = 64
"""Cells of a row: more groups share cells, so that the map of a 7B stays small."""
_KINDS = ("heads", "channels")


@dataclass(frozen=True)
class GroupMap:
    """The groups of one kind, a row a layer.

    Attributes:
        what: What a group is called: KV heads, query heads or channels.
        groups: Groups of a layer of the unpruned model.
        importance: Of each cell, over the mean of its layer; NaN where it is not known, such as in
            a layer that was dropped before it was scored. Shape (layers, cells).
        removed: Share of the groups of each cell that went, likewise.
        kept: Number of groups that each layer keeps; 0 for a dropped layer.
        is_sorted: Whether the cells of a layer ascend in importance; otherwise they are in the
            order of the model.
    """

    what: str
    groups: int
    importance: np.ndarray
    removed: np.ndarray
    kept: tuple[int, ...]
    is_sorted: bool

    @property
    def is_scored(self) -> bool:
        """Whether the importance of any group is known; not where only layers went."""
        return not bool(np.isnan(self.importance).all())

    @property
    def dropped(self) -> tuple[int, ...]:
        """Layers that are gone as wholes."""
        return tuple(layer for layer, count in enumerate(self.kept) if count == 0)

    @property
    def share(self) -> float:
        """Share of the groups that went."""
        return 1 - sum(self.kept) / (self.groups * len(self.kept))

    @property
    def groups_a_cell(self) -> int:
        """Groups that share a cell, at most."""
        return -(-self.groups // self.removed.shape[1])


def load_importance(path: Path) -> dict[str, np.ndarray]:
    """Read the importance of the groups of a run; nothing where there is none.

    Raises:
        ArtifactError: The file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not path.is_file():
        return {}
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ArtifactError(
            f"'{path}' cannot be read ({quote_error(error)}). Restore it, or delete it."
        ) from error


def build_maps(plan: PruningPlan, scores: Mapping[str, np.ndarray]) -> tuple[GroupMap, ...]:
    """Map the heads, and the channels, of a plan.

    Channels have no order of their own, so those of a layer are shown by their importance.

    Args:
        plan: Which groups stay.
        scores: Importance of each spec, shape (G,), when it was last scored.

    Returns:
        One for each kind of group that every layer has as many of.
    """
    maps = []
    for kind in _KINDS:
        specs = [spec for spec in plan.specs if spec.kind == kind]
        if specs and len({spec.num_groups for spec in specs}) == 1:
            maps.append(_build_map(plan, specs, scores, is_sorted=kind == "channels"))
    return tuple(maps)


def _build_map(
    plan: PruningPlan,
    specs: Sequence[GroupSpec],
    scores: Mapping[str, np.ndarray],
    *,
    is_sorted: bool,
) -> GroupMap:
    rows = [_build_row(spec, plan, scores.get(spec.name), is_sorted=is_sorted) for spec in specs]
    return GroupMap(
        what=name_groups(specs[0]),
        groups=specs[0].num_groups,
        importance=np.stack([importance for importance, _ in rows]),
        removed=np.stack([removed for _, removed in rows]),
        kept=tuple(len(plan.kept[spec.name]) for spec in specs),
        is_sorted=is_sorted,
    )


def _build_row(
    spec: GroupSpec, plan: PruningPlan, scores: np.ndarray | None, *, is_sorted: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return importance over its mean, and the share removed, of each cell of a layer."""
    removed = np.ones(spec.num_groups)
    removed[plan.kept[spec.name]] = 0
    importance = np.full(spec.num_groups, np.nan)
    if scores is not None and scores.shape == removed.shape and scores.mean() > 0:
        importance = scores / scores.mean()
    if is_sorted:
        # Where groups count as much, those that went come first.
        order = np.lexsort((-removed, np.nan_to_num(importance)))
        importance, removed = importance[order], removed[order]
    cells = min(spec.num_groups, MOST_CELLS)
    return (
        np.array([part.mean() for part in np.array_split(importance, cells)]),
        np.array([part.mean() for part in np.array_split(removed, cells)]),
    )
