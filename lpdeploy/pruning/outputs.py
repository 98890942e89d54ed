"""Scoring groups by the outputs of o_proj and down_proj: inputs are summed up layer by layer."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lpdeploy.criteria.record import ScoreOutputs
from lpdeploy.errors import LpdeployError
from lpdeploy.families.groups import expand_index
from lpdeploy.models.adapters import get_base_linear, get_lora_weights
from lpdeploy.models.sharded import get_rows
from lpdeploy.plan import GroupSpec, get_output
from lpdeploy.pruning.gram import add_gram
from lpdeploy.pruning.importance import Importance
from lpdeploy.pruning.walk import Calibration, Pace, enter_layers, evaluating, walk_layers


def score_layers(
    model: Any,
    specs: tuple[GroupSpec, ...],
    calibration: Calibration,
    score: ScoreOutputs,
    *,
    kept: Mapping[str, Tensor] | None = None,
) -> Importance:
    """Score the groups of every layer; the Gram matrices of one layer exist at a time.

    Args:
        model: The causal LM inside peft.
        specs: The groups to score.
        calibration: The rows whose tokens are summed up.
        score: Of a criterion.
        kept: Groups that are still there where the others are masked, as original indices; None
            where they were cut.

    Returns:
        Spec name -> score of the groups that are there, shape (alive,), float32.

    Raises:
        LpdeployError: Hidden states are not finite.
    """
    scores: Importance = {}
    with evaluating(model):
        streams = []
        for batch in calibration.batches:
            with calibration.autocast():
                streams.append(enter_layers(model, batch["input_ids"]))
        for index, layer in walk_layers(model, Pace("Scoring", calibration.ranks)):
            own = [spec for spec in specs if spec.layer == index]
            linears = {spec.name: model.get_submodule(get_output(spec).module) for spec in own}
            with _sum_inputs(linears) as (grams, show):
                for place, batch in enumerate(calibration.batches):
                    hidden, keywords = streams[place]
                    show(batch["attention_mask"].bool())
                    with calibration.autocast():
                        streams[place] = layer(hidden, **keywords[index]), keywords
            calibration.ranks.sum(list(grams.values()))
            for spec in own:
                groups = None if kept is None else kept[spec.name]
                scores[spec.name] = _score_output(spec, linears[spec.name], grams, score, groups)
    return scores


def _score_output(
    spec: GroupSpec,
    linear: Any,
    grams: dict[str, Tensor],
    score: ScoreOutputs,
    groups: Tensor | None,
) -> Tensor:
    weight, gram, piece = _merge(linear), grams.pop(spec.name), get_output(spec)
    if not gram.isfinite().all():
        raise LpdeployError(
            f"The inputs of {piece.module} are not finite. Check the model and the data, or use "
            "`dtype='fp32'`."
        )
    if groups is not None:
        columns = expand_index(groups, piece.block).to(weight.device)
        weight, gram = weight[:, columns], gram[columns][:, columns]
    return score(weight, gram, block=piece.block)


def _merge(linear: Any) -> Tensor:
    """Return the weight that a Linear computes with, in float32."""
    rows, lora = get_rows(get_base_linear(linear)), get_lora_weights(linear)
    b, a = lora.lora_b.float(), lora.lora_a.float()
    return torch.addmm(rows[: b.shape[0]].float(), b, a, alpha=lora.scaling)


@contextmanager
def _sum_inputs(
    linears: Mapping[str, nn.Module],
) -> Iterator[tuple[dict[str, Tensor], Callable[[Tensor], None]]]:
    """Add up X'X of the inputs of some Linears, over the tokens that the last mask shows."""
    grams: dict[str, Tensor] = {}
    shown: list[Tensor] = []

    def add(name: str, inputs: Tensor) -> None:
        tokens = inputs[shown[-1]].float()
        if name not in grams:
            grams[name] = tokens.new_zeros(tokens.shape[1], tokens.shape[1])
        add_gram(grams[name], tokens)

    handles = [
        linear.register_forward_pre_hook(lambda _, args, name=name: add(name, args[0]))
        for name, linear in linears.items()
    ]
    try:
        yield grams, shown.append
    finally:
        for handle in handles:
            handle.remove()
