"""How important each group is, from LoRA's gradients alone (Eqs. 4, 10 and 11)."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lpdeploy.models.adapters import get_base_linear, get_lora_weights
from lpdeploy.models.quantized import get_weight_shape, read_weight_rows
from lpdeploy.plan import GroupSpec

Importance = dict[str, Tensor]
"""Spec name -> importance of its groups, shape (G,), float32."""

# A few float32 buffers of this size (1 MB) are all that scoring needs beside the model. Large
# enough that kernel launches cost nothing, small enough to stay in a CPU's cache between passes.
_BLOCK_ELEMENTS = 1 << 18


def compute_lora_importance(  # noqa: PLR0913 - the seven quantities of Eq. 10, and the grouping
    weight: Tensor | nn.Module,
    lora_a: Tensor,
    lora_b: Tensor,
    grad_a: Tensor,
    grad_b: Tensor,
    *,
    scaling: float,
    dim: int,
    block: int,
) -> Tensor:
    """Score the groups of one linear layer from its LoRA gradients alone.

    The estimated gradient ``grad_b A + B grad_a - grad_b grad_a`` is the product of an
    (out, 2 rank) and a (2 rank, in) matrix, so it is formed a block of rows at a time and a
    gradient of the weight's size never exists.

    Args:
        weight: Frozen weight W, shape (out, in), any floating dtype; or the base Linear that
            holds it, quantised or not.
        lora_a: A, shape (rank, in).
        lora_b: B, shape (out, rank).
        grad_a: Gradient of the loss in A, shape (rank, in).
        grad_b: Gradient of the loss in B, shape (out, rank).
        scaling: ``alpha / rank``: the layer computes with W + scaling B A. It belongs to the
            weight that is removed; the estimated gradient is that of Eq. 9 in PEFT's A and B,
            and a constant factor in it would not change any ranking.
        dim: 0 if groups are rows (q, k, v, gate, up), 1 if columns (o, down).
        block: Consecutive rows or columns per group; 1 for an FFN channel.

    Returns:
        Importance, shape (G,), float32, non-negative, on the device of ``weight``.
        Units are loss squared: rank groups of one kind by it.

    Raises:
        ValueError: Shapes disagree, or ``block`` does not divide the dimension.

    Source:
        LoRAPrune, arXiv:2305.18403, Eq. 10 summed over a group by Eq. 4. The paper squares and
        sums without normalising a layer, and so do we.
    """
    shape = tuple(weight.shape) if isinstance(weight, Tensor) else get_weight_shape(weight)
    _check_shapes(shape, lora_a, lora_b, dim=dim, block=block)
    a, b = lora_a.detach().float(), lora_b.detach().float()
    grad_a, grad_b = grad_a.float(), grad_b.float()
    left = torch.cat([grad_b, b], dim=1)  # (out, 2R)
    right = torch.cat([a - grad_a, grad_a], dim=0)  # (2R, in)
    out, columns = shape
    scores = a.new_zeros(shape[dim])
    step = max(1, _BLOCK_ELEMENTS // columns)
    for start in range(0, out, step):
        rows = slice(start, min(start + step, out))
        merged = torch.addmm(_read_rows(weight, rows), b[rows], a, alpha=scaling)
        merged.mul_(left[rows] @ right).square_()
        if dim == 0:
            scores[rows] = merged.sum(dim=1)
        else:
            scores += merged.sum(dim=0)
    return scores.view(-1, block).sum(dim=1)  # (G * block,) -> (G,)


def _read_rows(weight: Tensor | nn.Module, rows: slice) -> Tensor:
    if isinstance(weight, Tensor):
        return weight[rows].float()
    return read_weight_rows(weight, rows)


def _check_shapes(
    shape: tuple[int, ...], lora_a: Tensor, lora_b: Tensor, *, dim: int, block: int
) -> None:
    out, columns = shape
    rank = lora_a.shape[0]
    if lora_a.shape != (rank, columns) or lora_b.shape != (out, rank):
        raise ValueError(
            f"LoRA factors {tuple(lora_a.shape)} and {tuple(lora_b.shape)} do not fit "
            f"a weight of shape {(out, columns)}"
        )
    if shape[dim] % block:
        raise ValueError(f"groups of {block} do not divide a dimension of {shape[dim]}")


@torch.no_grad()
def compute_importance(model: nn.Module, specs: Iterable[GroupSpec]) -> Importance:
    """Score every group of a live model with LoRA gradients in place (Eq. 4 over its Linears).

    Args:
        model: The causal LM inside peft, after ``backward`` and before the optimizer's step.
        specs: Groups to score.

    Returns:
        Importance of each spec, shape (groups still there,), float32.
    """
    scores: Importance = {}
    for spec in specs:
        for piece in spec.slices:
            linear = model.get_submodule(piece.module)
            lora = get_lora_weights(linear)
            if lora.lora_a.grad is None or lora.lora_b.grad is None:
                raise ValueError(f"{piece.module} has no LoRA gradients; call backward first")
            part = compute_lora_importance(
                get_base_linear(linear),
                lora.lora_a,
                lora.lora_b,
                lora.lora_a.grad,
                lora.lora_b.grad,
                scaling=lora.scaling,
                dim=piece.dim,
                block=piece.block,
            )
            scores[spec.name] = scores[spec.name] + part if spec.name in scores else part
    return scores


def apply_moving_average(average: Importance, scores: Importance, *, decay: float) -> None:
    """Fold the scores of one step into the average, in place (Eq. 11; it starts at zero).

    Args:
        average: The moving average so far; empty before the first step.
        scores: This step's importance.
        decay: lambda in [0, 1): how much of the past stays.
    """
    for name, score in scores.items():
        if name in average:
            average[name].lerp_(score, 1 - decay)
        else:
            average[name] = score * (1 - decay)
