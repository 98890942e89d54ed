"""Depth: whole layers go first, those whose absence raises the loss least.

Layers are dropped one after the other. Each round scores the layers that are left: a layer that
changes its input little (block influence) is a candidate, and of the candidates the one goes
without which the mean loss over a few calibration rows is lowest. Then the layers behind the first
dropped one may be refitted, as after any other removal.

Source:
    Greedy removal by the loss: Shortened LLaMA (arXiv:2402.02834) and SLEB (arXiv:2402.09025);
    block influence: ShortGPT (arXiv:2403.03853), equation 1. Using the second to choose the
    candidates of the first is ours: it makes the passes grow with the layers, not their square.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lpdeploy.config import PruneConfig
from lpdeploy.data.batches import TokenDataset
from lpdeploy.models.cutting import DroppedLayer, drop_layers
from lpdeploy.plan import GroupSpec, get_output
from lpdeploy.pruning.ranks import Ranks
from lpdeploy.pruning.refit import Part, count_refit_rows, refit_layers
from lpdeploy.pruning.walk import (
    Calibration,
    Pace,
    collect_calibration,
    enter_layers,
    evaluating,
    list_calibration_rows,
    make_autocast,
    sum_losses,
)

logger = logging.getLogger(__name__)

DEPTH_ROWS = 16
"""Calibration rows that decide which layers go."""
CANDIDATES = 8
"""Layers of which the loss without each is measured, at most, before one goes."""
_chosen: dict[str, tuple["Drop", ...]] = {}
"""Of what a choice depends on -> the longest choice so far, which begins with all shorter ones.

A run that tries several depths would make it for each of them, and once more for itself: most of
the time of the trials."""


@dataclass(frozen=True)
class Drop:
    """A layer that was dropped.

    Attributes:
        layer: Its index in the unpruned model.
        loss: Mean loss of the calibration rows without it and those dropped before it, in nats a
            token, before any refit.
    """

    layer: int
    loss: float


@dataclass(frozen=True)
class Depth:
    """What was dropped of a live model.

    Attributes:
        layers: Indices of the layers that are gone.
        kept: Of their groups, as a state has it: none.
        refitted: Modules whose weights were solved again.
    """

    layers: tuple[int, ...] = ()
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    refitted: frozenset[str] = frozenset()


def apply_depth(  # noqa: PLR0913 - all that a choice depends on
    model: Any,
    specs: Sequence[GroupSpec],
    dataset: TokenDataset,
    options: PruneConfig,
    *,
    ranks: Ranks,
    dtype: torch.dtype,
    stored: Mapping[str, torch.dtype],
    base_sha256: str | None = None,
) -> Depth:
    """Drop as many layers as the options ask for, and refit the others if they ask for that.

    Args:
        model: The causal LM (not the peft wrapper around it); moved to its device if any layer
            goes.
        specs: The groups of the layers that may be dropped.
        dataset: Tokens.
        options: How to prune.
        ranks: The processes that share the rows.
        dtype: Precision in which the model computes.
        stored: Module -> precision of its weight in the checkpoint, of those that may be refitted.
        base_sha256: Hash of the model, by which a choice is remembered in this process; None
            remembers nothing.

    Raises:
        LpdeployError: As ``refit_layers``.
    """

    def collect(num_rows: int) -> Calibration:
        rows = list_calibration_rows(dataset, step=0, num_rows=num_rows, seed=options.seed)
        size = options.micro_batch_size
        autocast = partial(make_autocast, ranks.device, dtype)
        return collect_calibration(
            dataset, rows, micro_batch_size=size, autocast=autocast, ranks=ranks
        )

    if not options.drop_layers:
        return Depth()
    if not options.shard:  # which is where it belongs, and cannot be moved
        model.to(ranks.device)
    among = sorted({spec.layer for spec in specs})
    part = (options.seed, options.micro_batch_size, options.load_in, options.refit, options.shard)
    key = repr((base_sha256, dataset.sha256, part, ranks.device, ranks.size, dtype, among))
    known = () if base_sha256 is None else _chosen.get(key, ())
    if len(known) < options.drop_layers:
        if ranks.is_first:
            logger.info("Choosing the layers to drop, by the loss without each.")
        known = choose_drops(
            model, collect(DEPTH_ROWS), among=among, count=options.drop_layers, known=known
        )
    if base_sha256 is not None:
        _chosen[key] = known
    drops = known[: options.drop_layers]
    layers = sorted(drop.layer for drop in drops)
    if ranks.is_first:
        each = ", ".join(f"{drop.layer} ({drop.loss:.3f})" for drop in drops)
        logger.info("layers dropped in turn, with the loss after each: %s", each)
    if not options.refit:
        drop_layers(model, layers)
        return _describe(specs, layers)
    if ranks.is_first:
        logger.info("Refitting the other layers.")
    columns = max(spec.num_groups * get_output(spec).block for spec in specs)
    rows = collect(count_refit_rows(options, dataset.lengths, columns=columns))
    return _describe(specs, layers, drop_and_refit(model, layers, rows, stored=stored))


def restore_depth(model: Any, specs: Sequence[GroupSpec], kept: Mapping[str, Tensor]) -> Depth:
    """Drop the layers of which a checkpoint keeps no group.

    Args:
        model: The causal LM (not the peft wrapper around it).
        specs: The groups of the layers that may be dropped.
        kept: Original indices of the groups that are still there.
    """
    layers = {spec.layer for spec in specs if spec.name in kept and not len(kept[spec.name])}
    drop_layers(model, layers)
    return _describe(specs, sorted(layers))


def _describe(
    specs: Sequence[GroupSpec], layers: Sequence[int], refitted: Iterable[str] = ()
) -> Depth:
    none = torch.empty(0, dtype=torch.int64)
    kept = {spec.name: none for spec in specs if spec.layer in layers}
    return Depth(tuple(layers), kept, frozenset(refitted))


def choose_drops(
    model: Any,
    calibration: Calibration,
    *,
    among: Sequence[int],
    count: int,
    known: Sequence[Drop] = (),
) -> tuple[Drop, ...]:
    """Choose the layers to drop, one after the other.

    Args:
        model: The causal LM (not the peft wrapper around it); it is not changed.
        calibration: The rows that decide.
        among: Layers that may go.
        count: How many of them go.
        known: The first of them, from an earlier choice over the same rows.

    Returns:
        The layers in the order in which they were chosen.
    """
    gone = list(known)
    before = {drop.layer for drop in known}
    alive = [
        index
        for index, layer in enumerate(model.model.layers)
        if not isinstance(layer, DroppedLayer) and index not in before
    ]
    pace = Pace("Choosing the layers to drop", calibration.ranks)
    with evaluating(model):
        while len(gone) < count:
            left = [layer for layer in alive if layer in among]
            if len(left) > CANDIDATES:
                influence = _compute_influence(model, calibration, alive)
                left = sorted(sorted(left, key=lambda layer: influence[layer])[:CANDIDATES])
            losses = _compute_losses_without(model, calibration, alive, left)
            gone.append(min(losses, key=lambda drop: drop.loss))
            alive.remove(gone[-1].layer)
            pace.say(f"{len(gone)} of {count}")
    return tuple(gone)


def _compute_influence(
    model: Any, calibration: Calibration, alive: Sequence[int]
) -> Mapping[int, float]:
    """Return the block influence of each layer, 1 - cos(input, output), summed over the tokens."""
    sums = torch.zeros(len(alive), dtype=torch.float64, device=calibration.ranks.device)
    for batch in calibration.batches:
        real = batch["attention_mask"].bool()
        with calibration.autocast():
            hidden, keywords = enter_layers(model, batch["input_ids"])
            for place, index in enumerate(alive):
                output = model.model.layers[index](hidden, **keywords[index])
                cosine = functional.cosine_similarity(hidden.float(), output.float(), dim=-1)
                sums[place] += (1 - cosine)[real].sum()
                hidden = output
    calibration.ranks.sum([sums])
    return dict(zip(alive, sums.tolist(), strict=True))


def _compute_losses_without(
    model: Any, calibration: Calibration, alive: Sequence[int], candidates: Sequence[int]
) -> list[Drop]:
    """Return the mean loss without each candidate, where all layers that are alive run else.

    What comes before a candidate is computed once for all of them.
    """
    device = calibration.ranks.device
    sums = torch.zeros(len(candidates), 2, dtype=torch.float64, device=device)
    for batch in calibration.batches:
        with calibration.autocast():
            hidden, keywords = enter_layers(model, batch["input_ids"])
            for place, index in enumerate(alive):
                if index in candidates:
                    rest = hidden
                    for later in alive[place + 1 :]:
                        rest = model.model.layers[later](rest, **keywords[later])
                    normed = model.model.norm(rest)
                    sums[candidates.index(index)] += sum_losses(model, normed, batch["labels"])
                hidden = model.model.layers[index](hidden, **keywords[index])
    calibration.ranks.sum([sums])
    return [
        Drop(layer, loss / tokens)
        for layer, (loss, tokens) in zip(candidates, sums.tolist(), strict=True)
    ]


def drop_and_refit(
    model: Any,
    layers: Sequence[int],
    calibration: Calibration,
    *,
    stored: Mapping[str, torch.dtype],
) -> set[str]:
    """Drop layers, and solve ``o_proj`` and ``down_proj`` of the layers behind the first of them.

    Args:
        model: The causal LM (not the peft wrapper around it).
        layers: Those that go.
        calibration: The rows to solve over.
        stored: Module -> precision of its weight in the checkpoint, of those that may be solved.

    Returns:
        Modules whose weights were solved again.

    Raises:
        LpdeployError: As ``refit_layers``.
    """
    refitted: set[str] = set()

    def remove(layer: int) -> dict[str, Part] | None:
        if layer in layers:
            return None
        if layer < min(layers):
            return {}
        own = [module for module in stored if module.startswith(f"model.layers.{layer}.")]
        refitted.update(own)
        return {module.rpartition(".")[2]: Part(None, stored[module]) for module in own}

    refit_layers(model, calibration, remove=remove)
    drop_layers(model, layers)
    return refitted
