"""The groups that are still there, how important they are, and their removal."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lpdeploy.config import PruneConfig
from lpdeploy.criteria import CRITERIA
from lpdeploy.models.cutting import (
    CutParameter,
    apply_cut,
    apply_cut_to_adapter,
    apply_cut_to_optimizer,
    apply_masks,
)
from lpdeploy.plan import GroupSpec, Kept
from lpdeploy.pruning.importance import Importance, apply_moving_average
from lpdeploy.pruning.ranks import Ranks
from lpdeploy.pruning.scoring import ScoreForm, Scorer
from lpdeploy.pruning.selection import select_globally, select_per_layer

SELECTIONS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "layer": select_per_layer,
    "global": select_globally,
}


@dataclass
class PruningState:
    """What pruning remembers from step to step.

    Attributes:
        model: The causal LM inside peft.
        specs: The groups that may be removed (none of protected layers).
        scorer: Scores them.
        removal: ``cut`` or ``mask``.
        kept: Original indices of the groups still there, int64, shape (alive,).
        average: Moving average of their importance (Eq. 11), shape (alive,).
        last_seen: Importance of every group when it was last scored, shape (G,).
    """

    model: Any
    specs: tuple[GroupSpec, ...]
    scorer: Scorer
    removal: str
    kept: dict[str, Tensor] = field(default_factory=dict)
    average: Importance = field(default_factory=dict)
    last_seen: Importance = field(default_factory=dict)
    _handles: list[RemovableHandle] = field(default_factory=list)

    def __post_init__(self) -> None:
        for spec in self.specs:
            self.kept.setdefault(spec.name, torch.arange(spec.num_groups))
            self.last_seen.setdefault(spec.name, torch.zeros(spec.num_groups))
        if self.removal == "mask":
            self._apply_masks()

    def update_average(self, *, decay: float) -> None:
        """Score the live groups from the observed batch and fold them into the average."""
        # A masked model still has the groups that are gone.
        scores = self.scorer.compute_importance(self.kept if self.removal == "mask" else None)
        apply_moving_average(self.average, scores, decay=decay)

    def remove_groups(
        self, ratios: Mapping[str, float], *, scope: str, multiples: Mapping[str, int]
    ) -> list[CutParameter]:
        """Remove the least important groups until ``ratios`` of the unpruned ones are gone.

        Returns:
            Trainable parameters that were replaced by smaller ones; none when masking.
        """
        average = {name: scores.cpu() for name, scores in self.average.items()}
        for name, scores in average.items():
            self.last_seen[name][self.kept[name]] = scores
        stay = SELECTIONS[scope](average, self.specs, ratios=ratios, multiples=multiples)
        stay = {name: s for name, s in stay.items() if len(s) < len(self.kept[name])}
        for name, positions in stay.items():
            self.kept[name] = self.kept[name][positions]
            scores = self.average[name]
            self.average[name] = scores[positions.to(scores.device)]
        if self.removal == "mask":
            self._apply_masks()
            return []
        return apply_cut(self.model, self.specs, stay)

    def cut_masked(self) -> None:
        """Cut the adapter of a run that masks, at its end; the model does not run any more."""
        if self.removal == "mask":
            self._remove_masks()
            apply_cut_to_adapter(self.model, self.specs, self.kept)

    def list_kept(self, specs: tuple[GroupSpec, ...]) -> Kept:
        """Return kept indices as plain lists; specs that may not be pruned keep all."""
        return {
            spec.name: self.kept.get(spec.name, torch.arange(spec.num_groups)).tolist()
            for spec in specs
        }

    def _apply_masks(self) -> None:
        self._remove_masks()
        masks = {}
        for spec in self.specs:
            masks[spec.name] = torch.zeros(spec.num_groups, dtype=torch.bool)
            masks[spec.name][self.kept[spec.name]] = True
        self._handles = apply_masks(self.model, self.specs, masks)

    def _remove_masks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def build_state(
    model: Any,
    specs: tuple[GroupSpec, ...],
    options: PruneConfig,
    *,
    ranks: Ranks | None = None,
    kept: Mapping[str, Tensor] | None = None,
) -> PruningState:
    """Return the state before the first step, or where a checkpoint left off.

    Args:
        model: The causal LM inside peft.
        specs: The groups that may be removed.
        options: How they are scored and removed.
        ranks: The processes that share the batch; this one alone if None.
        kept: Original indices of the groups that are still in ``model``; all of them if None.
    """
    scorer = Scorer(
        CRITERIA[options.criterion],
        model,
        specs,
        form=ScoreForm(absolute=options.score_form == "absolute", normalize=options.normalize),
        ranks=ranks or Ranks(),
        offload_gradients=options.offload_gradients,
    )
    return PruningState(model, specs, scorer, options.effective_removal, kept=dict(kept or {}))


def apply_event(
    state: PruningState, options: PruneConfig, *, progress: float, optimizer: Any = None
) -> None:
    """Remove groups from a live model, and from the optimizer that trains it.

    Args:
        state: The groups that are still there.
        options: How many are removed in the end.
        progress: The part of what is to go that is gone after this event, in (0, 1].
        optimizer: Holds the parameters that are cut, and their moments; None if there is none.
    """
    replaced = state.remove_groups(
        {kind: ratio * progress for kind, ratio in options.ratios.items()},
        scope=options.scope,
        multiples=options.multiples,
    )
    if optimizer is not None:
        apply_cut_to_optimizer(optimizer, replaced)
