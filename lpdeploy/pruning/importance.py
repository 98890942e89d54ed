"""How important each group is: sums of scores over a group (Eq. 4), and their average (Eq. 11).

A criterion gives a number for each weight, which is squared (or made absolute) and summed over a
group. The numbers are formed a block of rows at a time, so that no temporary of the weight's size
exists.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from lpdeploy.criteria import Criterion, ScoredLinear

Importance = dict[str, Tensor]
"""Spec name -> importance of its groups, shape (G,), float32."""

# A few float32 buffers of this size (1 MB) are all that scoring needs beside the model. Large
# enough that kernel launches cost nothing, small enough to stay in a CPU's cache between passes.
_BLOCK_ELEMENTS = 1 << 18


class Rows(Protocol):
    """A weight of which rows can be read: a tensor, or a quantized or sharded weight.

    A sharded one has ``own_rows``, a range: only these can be read, and what is computed is the
    part of each sum that belongs to them.
    """

    @property
    def shape(self) -> Any:
        """(out, in)."""

    def __getitem__(self, rows: slice, /) -> Tensor:
        """Return rows, shape (rows, in), any floating dtype."""


def score_linear(
    criterion: Criterion,
    weight: Rows,
    linear: ScoredLinear,
    *,
    dim: int,
    block: int,
    absolute: bool = False,
) -> Tensor:
    """Score the groups of one Linear by a criterion that scores weights.

    Args:
        criterion: One with ``score_weights``.
        weight: Frozen weight W, shape (out, in), any floating dtype.
        linear: LoRA's part of it, and what was observed.
        dim: 0 if groups are rows (q, k, v, gate, up), 1 if columns (o, down).
        block: Consecutive rows or columns per group; 1 for an FFN channel.
        absolute: Sum absolute values instead of squares.

    Returns:
        Importance, shape (G,), float32, non-negative, on the device of LoRA's factors. Units are
        those of the squared score (of the score, if absolute): rank groups of one kind by it.

    Raises:
        ValueError: Shapes disagree, or ``block`` does not divide the dimension.

    Source:
        LoRAPrune, arXiv:2305.18403, Eq. 4.
    """
    _check_lora(weight, linear)
    out, columns = weight.shape
    if weight.shape[dim] % block:
        raise ValueError(f"groups of {block} do not divide a dimension of {weight.shape[dim]}")
    assert criterion.score_weights is not None
    score = criterion.score_weights(linear)
    a, b = linear.lora_a.detach().float(), linear.lora_b.detach().float()
    sums = a.new_zeros(weight.shape[dim])
    step = max(1, _BLOCK_ELEMENTS // columns)
    own = getattr(weight, "own_rows", range(out))
    for start in range(own.start, own.stop, step):
        rows = slice(start, min(start + step, own.stop))
        merged = torch.addmm(weight[rows].float(), b[rows], a, alpha=linear.scaling)
        scores = score(rows, merged)
        scores = scores.abs_() if absolute else scores.square_()
        if dim == 0:
            sums[rows] = scores.sum(dim=1)
        else:
            sums += scores.sum(dim=0)
    return sums.view(-1, block).sum(dim=1)  # (G * block,) -> (G,)


def _check_lora(weight: Rows, linear: ScoredLinear) -> None:
    out, columns = weight.shape
    rank = linear.lora_a.shape[0]
    if linear.lora_a.shape != (rank, columns) or linear.lora_b.shape != (out, rank):
        raise ValueError(
            f"LoRA factors {tuple(linear.lora_a.shape)} and {tuple(linear.lora_b.shape)} do not "
            f"fit a weight of shape {(out, columns)}"
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
