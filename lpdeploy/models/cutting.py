"""Removing groups from a live model, or masking them where they cannot be removed in place."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lpdeploy.families.groups import expand_index
from lpdeploy.models.adapters import get_base_linear
from lpdeploy.models.quantized import cut_quantized, get_quantization
from lpdeploy.models.shapes import set_depth
from lpdeploy.plan import GroupSpec, Slice, get_output


@dataclass(frozen=True)
class CutParameter:
    """A trainable parameter that was replaced by a smaller one.

    Attributes:
        old: The parameter before the cut.
        new: The parameter that stands in its place.
        dim: The dimension that was cut.
        index: Kept positions along ``dim``, shape (kept,).
    """

    old: nn.Parameter
    new: nn.Parameter
    dim: int
    index: Tensor


class DroppedLayer(nn.Module):
    """Stands in the place of a layer that was dropped, so that the others keep their names."""

    def forward(self, hidden: Tensor, **_: Any) -> Tensor:
        """Return what it is given."""
        return hidden


def drop_layers(model: Any, layers: Iterable[int]) -> None:
    """Drop whole layers of a live model, of which the others keep their names.

    Args:
        model: The causal LM (not the peft wrapper around it).
        layers: Their indices.
    """
    for index in layers:
        model.model.layers[index] = DroppedLayer()


def close_gaps(model: Any) -> None:
    """Number the layers anew, where some were dropped: as a checkpoint has them, and a KV cache."""
    layers = [each for each in model.model.layers if not isinstance(each, DroppedLayer)]
    if len(layers) == len(model.model.layers):
        return
    stay = [layer.self_attn.layer_idx for layer in layers]
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index
    model.model.layers = nn.ModuleList(layers)
    set_depth(model.config, stay)


def apply_cut(
    model: nn.Module, specs: Iterable[GroupSpec], kept: Mapping[str, Tensor]
) -> list[CutParameter]:
    """Cut groups out of a live model: frozen weights, biases and LoRA factors.

    Args:
        model: The causal LM (not the peft wrapper around it). Its Linears may carry LoRA.
        specs: Groups to cut; only those named in ``kept`` are touched.
        kept: Kept positions among the groups that are still there, int64, ascending, shape (G,).

    Returns:
        Every trainable parameter that was replaced, for ``apply_cut_to_optimizer``.

    Raises:
        ValueError: The weights are 4-bit, which can only be masked.
    """
    replaced: list[CutParameter] = []
    with torch.no_grad():
        for spec in specs:
            if spec.name in kept:
                for piece in spec.slices:
                    linear = model.get_submodule(piece.module)
                    replaced += _cut_linear(linear, piece, kept[spec.name])
                if spec.kind == "heads":
                    _set_grouping(model.get_submodule(get_output(spec).module.rpartition(".")[0]))
    return replaced


def _set_grouping(attention: Any) -> None:
    """Let attention know how many query heads share a KV head now."""
    query, key = (get_base_linear(each) for each in (attention.q_proj, attention.k_proj))
    attention.num_key_value_groups = query.out_features // key.out_features


def _cut_linear(linear: Any, piece: Slice, kept: Tensor) -> list[CutParameter]:
    base = get_base_linear(linear)
    index = expand_index(kept.to(base.weight.device), piece.block)
    replaced = []
    if get_quantization(base):
        cut_quantized(base, dim=piece.dim, index=index)
    else:
        replaced.append(_cut_parameter(base, "weight", piece.dim, index))
    if piece.dim == 0 and base.bias is not None:
        replaced.append(_cut_parameter(base, "bias", 0, index))
    _set_features(base, piece.dim, len(index))
    replaced += _cut_lora(linear, piece.dim, index)
    return [cut for cut in replaced if cut.new.requires_grad]


def _cut_lora(linear: Any, dim: int, index: Tensor) -> list[CutParameter]:
    if not hasattr(linear, "lora_A"):
        return []
    # Rows of W are rows of B, columns of W are columns of A; the other factor is untouched.
    factors = linear.lora_B if dim == 0 else linear.lora_A
    replaced = [_cut_parameter(f, "weight", dim, index) for f in factors.values()]
    for factor in factors.values():
        _set_features(factor, dim, len(index))
    _set_features(linear, dim, len(index))
    return replaced


def apply_cut_to_adapter(
    model: nn.Module, specs: Iterable[GroupSpec], kept: Mapping[str, Tensor]
) -> None:
    """Cut the LoRA factors alone, to save the adapter of a model that masks its groups.

    The weights beneath keep their widths, 4-bit ones could not be cut, so the model does not run
    any more.

    Args:
        model: The causal LM (not the peft wrapper around it).
        specs: Groups to cut; only those named in ``kept`` are touched.
        kept: Kept positions, int64, ascending, shape (G,).
    """
    with torch.no_grad():
        for spec in specs:
            for piece in spec.slices if spec.name in kept else ():
                linear = model.get_submodule(piece.module)
                device = get_base_linear(linear).weight.device
                index = expand_index(kept[spec.name].to(device), piece.block)
                _cut_lora(linear, piece.dim, index)


def _cut_parameter(module: nn.Module, name: str, dim: int, index: Tensor) -> CutParameter:
    old = getattr(module, name)
    new = nn.Parameter(old.index_select(dim, index).contiguous(), requires_grad=old.requires_grad)
    setattr(module, name, new)
    return CutParameter(old=old, new=new, dim=dim, index=index)


def _set_features(linear: nn.Module, dim: int, width: int) -> None:
    setattr(linear, "out_features" if dim == 0 else "in_features", width)


def apply_cut_to_optimizer(
    optimizer: torch.optim.Optimizer, replaced: Iterable[CutParameter]
) -> None:
    """Let an optimizer train the smaller parameters, with their part of its moments."""
    by_old = {cut.old: cut for cut in replaced}
    for group in optimizer.param_groups:
        group["params"] = [by_old[p].new if p in by_old else p for p in group["params"]]
    for old, cut in by_old.items():
        state = optimizer.state.pop(old, None)
        if state is not None:
            optimizer.state[cut.new] = {
                name: value.index_select(cut.dim, cut.index)
                if isinstance(value, Tensor) and value.shape == old.shape
                else value
                for name, value in state.items()
            }


def apply_masks(
    model: nn.Module, specs: Iterable[GroupSpec], masks: Mapping[str, Tensor]
) -> list[RemovableHandle]:
    """Multiply the input of o_proj and down_proj by a mask, from now on (Eq. 13).

    A group that is zero there adds nothing to the model's output, and nothing inside the group
    receives a gradient: the same function as the model without the group.

    Args:
        model: The causal LM; each spec has exactly one slice over columns.
        specs: Groups to mask; only those named in ``masks``.
        masks: True = kept, shape (G,).

    Returns:
        Handles that remove the masks.
    """
    return [
        _mask_input(model.get_submodule(piece.module), masks[spec.name], piece.block)
        for spec in specs
        if spec.name in masks
        for piece in spec.slices
        if piece.dim == 1
    ]


def _mask_input(linear: nn.Module, mask: Tensor, block: int) -> RemovableHandle:
    weight = get_base_linear(linear).weight
    columns = mask.to(weight.device).repeat_interleave(block)  # (G,) -> (G * block,)

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0] * columns.to(args[0].dtype), *args[1:])

    return linear.register_forward_pre_hook(hook)
