"""How important each group is: the score of one Linear, and the average over steps (Eqs. 3 to 11).

Every score here is a number for each weight, squared (or absolute) and summed over a group. The
numbers are formed a block of rows at a time, so that no temporary of the weight's size exists.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from lpdeploy.models.adapters import LoraWeights

Importance = dict[str, Tensor]
"""Spec name -> importance of its groups, shape (G,), float32."""

# A few float32 buffers of this size (1 MB) are all that scoring needs beside the model. Large
# enough that kernel launches cost nothing, small enough to stay in a CPU's cache between passes.
_BLOCK_ELEMENTS = 1 << 18


class Rows(Protocol):
    """A weight of which rows can be read: a tensor, or a quantised or sharded weight.

    A sharded one has ``own_rows``, a range: only these can be read, and what is computed is the
    part of each sum that belongs to them.
    """

    @property
    def shape(self) -> Any:
        """(out, in)."""

    def __getitem__(self, rows: slice, /) -> Tensor:
        """Return rows, shape (rows, in), any floating dtype."""


def compute_lora_importance(
    weight: Rows,
    lora: LoraWeights,
    grad_a: Tensor,
    grad_b: Tensor,
    *,
    dim: int,
    block: int,
    absolute: bool = False,
) -> Tensor:
    """Score the groups of one linear layer from its LoRA gradients alone.

    The estimated gradient ``grad_b A + B grad_a - grad_b grad_a`` is the product of an
    (out, 2 rank) and a (2 rank, in) matrix, so it is formed a block of rows at a time and a
    gradient of the weight's size never exists.

    Args:
        weight: Frozen weight W, shape (out, in), any floating dtype.
        lora: A, B and the scaling: the layer computes with W + scaling B A. The scaling belongs
            to the weight that is removed; the estimated gradient is that of Eq. 9 in PEFT's A
            and B, and a constant factor in it would not change any ranking.
        grad_a: Gradient of the loss in A, shape (rank, in).
        grad_b: Gradient of the loss in B, shape (out, rank).
        dim: 0 if groups are rows (q, k, v, gate, up), 1 if columns (o, down).
        block: Consecutive rows or columns per group; 1 for an FFN channel.
        absolute: Sum absolute values instead of squares.

    Returns:
        Importance, shape (G,), float32, non-negative, on the device of the gradients.
        Units are loss squared (loss, if absolute): rank groups of one kind by it.

    Raises:
        ValueError: Shapes disagree, or ``block`` does not divide the dimension.

    Source:
        LoRAPrune, arXiv:2305.18403, Eq. 10 summed over a group by Eq. 4. The paper squares and
        sums without normalising a layer, which is the default.
    """
    _check_lora(weight, lora)
    grad_a, grad_b = grad_a.float(), grad_b.float()
    left = torch.cat([grad_b, lora.lora_b.detach().float()], dim=1)  # (out, 2R)
    right = torch.cat([lora.lora_a.detach().float() - grad_a, grad_a], dim=0)  # (2R, in)

    def score(rows: slice, merged: Tensor) -> Tensor:
        return merged.mul_(left[rows] @ right)

    return _sum_groups(weight, lora, score, dim=dim, block=block, absolute=absolute)


def compute_gradient_importance(
    weight: Rows,
    lora: LoraWeights,
    gradient: Tensor,
    *,
    dim: int,
    block: int,
    absolute: bool = False,
) -> Tensor:
    """Score the groups of one linear layer from the true gradient of its weight.

    Args:
        weight: Frozen weight W, shape (out, in).
        lora: The update on it. The weight that is removed is W + scaling B A, and its gradient
            is that of W.
        gradient: Gradient of the loss in W, shape (out, in), on any device: rows of it move.
        dim: 0 if groups are rows, 1 if columns.
        block: Consecutive rows or columns per group.
        absolute: Sum absolute values instead of squares.

    Returns:
        Importance, shape (G,), float32, non-negative.

    Raises:
        ValueError: Shapes disagree, or ``block`` does not divide the dimension.

    Source:
        LoRAPrune, arXiv:2305.18403, Eqs. 3 and 4 (LLM-Pruner, arXiv:2305.11627, first order).
    """
    _check_lora(weight, lora)
    if gradient.shape != weight.shape:
        raise ValueError(f"a gradient of shape {tuple(gradient.shape)} is of another weight")

    def score(rows: slice, merged: Tensor) -> Tensor:
        return merged.mul_(gradient[rows].to(merged.device, torch.float32))

    return _sum_groups(weight, lora, score, dim=dim, block=block, absolute=absolute)


def compute_weight_importance(
    weight: Rows,
    lora: LoraWeights,
    input_norm: Tensor | None = None,
    *,
    dim: int,
    block: int,
    absolute: bool = False,
) -> Tensor:
    """Score the groups of one linear layer by the size of its weights, and of what they multiply.

    Args:
        weight: Frozen weight W, shape (out, in).
        lora: The update on it; W + scaling B A is scored.
        input_norm: L2 norm of each input feature over the tokens of a batch, shape (in,)
            (Wanda); None for the magnitude alone.
        dim: 0 if groups are rows, 1 if columns.
        block: Consecutive rows or columns per group.
        absolute: Sum absolute values instead of squares.

    Returns:
        Importance, shape (G,), float32, non-negative.

    Raises:
        ValueError: Shapes disagree, or ``block`` does not divide the dimension.

    Source:
        Wanda, arXiv:2306.11695, Eq. 1, summed over a group by Eq. 4 of LoRAPrune. Wanda compares
        the weights of one row; a group spans rows, so its scores are compared within a layer.
    """
    _check_lora(weight, lora)

    def score(_: slice, merged: Tensor) -> Tensor:
        return merged if input_norm is None else merged.mul_(input_norm)

    return _sum_groups(weight, lora, score, dim=dim, block=block, absolute=absolute)


def _sum_groups(
    weight: Rows,
    lora: LoraWeights,
    score: Callable[[slice, Tensor], Tensor],
    *,
    dim: int,
    block: int,
    absolute: bool,
) -> Tensor:
    """Sum the scores of all weights over groups (Eq. 4); ``score`` may write to its argument."""
    out, columns = weight.shape
    if weight.shape[dim] % block:
        raise ValueError(f"groups of {block} do not divide a dimension of {weight.shape[dim]}")
    a, b = lora.lora_a.detach().float(), lora.lora_b.detach().float()
    sums = a.new_zeros(weight.shape[dim])
    step = max(1, _BLOCK_ELEMENTS // columns)
    own = getattr(weight, "own_rows", range(out))
    for start in range(own.start, own.stop, step):
        rows = slice(start, min(start + step, own.stop))
        merged = torch.addmm(weight[rows].float(), b[rows], a, alpha=lora.scaling)
        scores = score(rows, merged)
        scores = scores.abs_() if absolute else scores.square_()
        if dim == 0:
            sums[rows] = scores.sum(dim=1)
        else:
            sums += scores.sum(dim=0)
    return sums.view(-1, block).sum(dim=1)  # (G * block,) -> (G,)


def _check_lora(weight: Rows, lora: LoraWeights) -> None:
    out, columns = weight.shape
    rank = lora.lora_a.shape[0]
    if lora.lora_a.shape != (rank, columns) or lora.lora_b.shape != (out, rank):
        raise ValueError(
            f"LoRA factors {tuple(lora.lora_a.shape)} and {tuple(lora.lora_b.shape)} do not fit "
            f"a weight of shape {(out, columns)}"
        )


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
