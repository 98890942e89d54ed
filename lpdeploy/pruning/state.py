"""The groups that are still there, how important they are, and their removal."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lpdeploy.config import PruneConfig
from lpdeploy.criteria import CRITERIA
from lpdeploy.families.groups import expand_index
from lpdeploy.models.adapters import get_base_linear
from lpdeploy.models.cutting import (
    CutParameter,
    apply_cut,
    apply_cut_to_adapter,
    apply_cut_to_optimizer,
    apply_masks,
)
from lpdeploy.models.run_weights import copy_columns
from lpdeploy.plan import GroupSpec, Kept, get_output
from lpdeploy.pruning.importance import Importance, apply_moving_average
from lpdeploy.pruning.outputs import score_layers
from lpdeploy.pruning.ranks import Ranks
from lpdeploy.pruning.refit import Part, refit_layers
from lpdeploy.pruning.scoring import ScoreForm, Scorer
from lpdeploy.pruning.selection import select_globally, select_per_layer
from lpdeploy.pruning.walk import Calibration

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
        stored: Module -> precision of its weight in the checkpoint, of those that may be refitted.
        refitted: Modules whose weights were refitted.
    """

    model: Any
    specs: tuple[GroupSpec, ...]
    scorer: Scorer
    removal: str
    kept: dict[str, Tensor] = field(default_factory=dict)
    average: Importance = field(default_factory=dict)
    last_seen: Importance = field(default_factory=dict)
    stored: Mapping[str, torch.dtype] = field(default_factory=dict)
    refitted: set[str] = field(default_factory=set)
    _handles: dict[str, list[RemovableHandle]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for spec in self.specs:
            self.kept.setdefault(spec.name, torch.arange(spec.num_groups))
            self.last_seen.setdefault(spec.name, torch.zeros(spec.num_groups))
        if self.removal == "mask":
            self._apply_masks(self.specs)

    def update_average(self, *, decay: float) -> None:
        """Score the live groups from the observed batch and fold them into the average."""
        # A masked model still has the groups that are gone.
        scores = self.scorer.compute_importance(self.kept if self.removal == "mask" else None)
        apply_moving_average(self.average, scores, decay=decay)

    def score_outputs(self, calibrate: Callable[[int], Calibration]) -> None:
        """Score the live groups by the rows of an event, if the criterion does.

        Args:
            calibrate: Gives the rows, for a number of columns.
        """
        score = self.scorer.criterion.score_outputs
        if score is not None:
            columns = max(len(self.kept[s.name]) * get_output(s).block for s in self.specs)
            kept = self.kept if self.removal == "mask" else None
            rows = calibrate(columns)
            self.average = score_layers(self.model, self.specs, rows, score, kept=kept)

    def remove_groups(
        self,
        ratios: Mapping[str, float],
        *,
        scope: str,
        multiples: Mapping[str, int],
        calibrate: Callable[[int], Calibration] | None = None,
    ) -> list[CutParameter]:
        """Remove the least important groups until ``ratios`` of the unpruned ones are gone.

        Args:
            ratios: Share to remove of each kind of group.
            scope: ``layer`` or ``global``.
            multiples: What the kept groups of each kind are a multiple of.
            calibrate: Gives the rows to refit over, for a number of columns; None for no refit.

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
        if calibrate is None or not stay:
            return self._drop(self.specs, stay)
        return self._drop_and_refit(stay, calibrate)

    def _drop(self, specs: Iterable[GroupSpec], stay: Mapping[str, Tensor]) -> list[CutParameter]:
        """Cut or mask groups of some specs; ``stay`` holds positions among those still there."""
        if self.removal == "cut":
            return apply_cut(self.model, specs, stay)
        self._apply_masks(spec for spec in specs if spec.name in stay)
        return []

    def _drop_and_refit(
        self, stay: Mapping[str, Tensor], calibrate: Callable[[int], Calibration]
    ) -> list[CutParameter]:
        replaced: list[CutParameter] = []

        def remove(layer: int) -> dict[str, Part]:
            own = [spec for spec in changed if spec.layer == layer]
            replaced.extend(self._drop(own, stay))
            return {
                get_output(spec).module.rpartition(".")[2]: self._name_part(spec) for spec in own
            }

        changed = [spec for spec in self.specs if spec.name in stay]
        columns = max(len(stay[spec.name]) * get_output(spec).block for spec in changed)
        refit_layers(self.model, calibrate(columns), remove=remove)
        self.refitted.update(get_output(spec).module for spec in changed)
        return replaced

    def _name_part(self, spec: GroupSpec) -> Part:
        columns = None if self.removal == "cut" else self._list_columns(spec)
        return Part(columns, self.stored[get_output(spec).module])

    def _list_columns(self, spec: GroupSpec) -> Tensor:
        """Return the columns of a spec's output weight that stay, counted in the unpruned one."""
        piece = get_output(spec)
        linear = get_base_linear(self.model.get_submodule(piece.module))
        return expand_index(self.kept[spec.name], piece.block).to(linear.weight.device)

    def list_refit(self) -> dict[str, Tensor]:
        """Return the refitted weights, shape (out, kept), in the precision of the checkpoint."""
        found = {}
        for spec in self.specs:
            piece = get_output(spec)
            if piece.module in self.refitted:
                weight = get_base_linear(self.model.get_submodule(piece.module)).weight
                own = weight if self.removal == "cut" else weight[:, self._list_columns(spec)]
                found[piece.module] = own.detach().to("cpu", self.stored[piece.module]).contiguous()
        return found

    def restore_refit(self, refit: Mapping[str, Tensor]) -> None:
        """Copy refitted weights into a model whose groups are removed already."""
        for spec in self.specs:
            piece = get_output(spec)
            if piece.module in refit:
                weight = get_base_linear(self.model.get_submodule(piece.module)).weight
                copy_columns(weight.data, refit[piece.module], self._list_columns(spec))
                self.refitted.add(piece.module)

    def cut_masked(self) -> None:
        """Cut the adapter of a run that masks, at its end; the model does not run any more."""
        if self.removal == "mask":
            for spec in self.specs:
                self._remove_mask(spec)
            apply_cut_to_adapter(self.model, self.specs, self.kept)

    def list_kept(self, specs: tuple[GroupSpec, ...]) -> Kept:
        """Return kept indices as plain lists; specs that may not be pruned keep all."""
        return {
            spec.name: self.kept.get(spec.name, torch.arange(spec.num_groups)).tolist()
            for spec in specs
        }

    def _apply_masks(self, specs: Iterable[GroupSpec]) -> None:
        for spec in specs:
            self._remove_mask(spec)
            mask = torch.zeros(spec.num_groups, dtype=torch.bool)
            mask[self.kept[spec.name]] = True
            self._handles[spec.name] = apply_masks(self.model, [spec], {spec.name: mask})

    def _remove_mask(self, spec: GroupSpec) -> None:
        for handle in self._handles.pop(spec.name, []):
            handle.remove()


def build_state(
    model: Any,
    specs: tuple[GroupSpec, ...],
    options: PruneConfig,
    *,
    ranks: Ranks | None = None,
    kept: Mapping[str, Tensor] | None = None,
    stored: Mapping[str, torch.dtype] | None = None,
) -> PruningState:
    """Return the state before the first step, or where a checkpoint left off.

    Args:
        model: The causal LM inside peft.
        specs: The groups that may be removed.
        options: How they are scored and removed.
        ranks: The processes that share the batch; this one alone if None.
        kept: Original indices of the groups that are still in ``model``; all of them if None.
        stored: Module -> precision of its weight in the checkpoint; None where nothing is refitted.
    """
    scorer = Scorer(
        CRITERIA[options.criterion],
        model,
        specs,
        form=ScoreForm(absolute=options.score_form == "absolute", normalize=options.normalize),
        ranks=ranks or Ranks(),
        offload_gradients=options.offload_gradients,
    )
    return PruningState(
        model, specs, scorer, options.effective_removal, kept=dict(kept or {}), stored=stored or {}
    )


def apply_event(
    state: PruningState,
    options: PruneConfig,
    *,
    progress: float,
    optimizer: Any = None,
    calibrate: Callable[[int], Calibration] | None = None,
) -> None:
    """Remove groups from a live model, and from the optimizer that trains it.

    Args:
        state: The groups that are still there.
        options: How many are removed in the end.
        progress: The part of what is to go that is gone after this event, in (0, 1].
        optimizer: Holds the parameters that are cut, and their moments; None if there is none.
        calibrate: Gives the rows to score outputs and to refit over, for a number of columns; None
            where neither is asked for.
    """
    if calibrate is not None:
        state.score_outputs(calibrate)
    replaced = state.remove_groups(
        {kind: ratio * progress for kind, ratio in options.ratios.items()},
        scope=options.scope,
        multiples=options.widths.multiples,
        calibrate=calibrate if options.refit else None,
    )
    if optimizer is not None:
        apply_cut_to_optimizer(optimizer, replaced)
