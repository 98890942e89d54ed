"""Dropout that costs little on a CPU, where PyTorch draws a number for each element."""

from typing import Any

import torch
from torch import Tensor, nn

_BITS = 16  # of randomness an element: probabilities are exact to 1 / 65,536


class Dropout(nn.Dropout):
    """``nn.Dropout``, but on a CPU four elements share a draw, and a byte is kept for each.

    PyTorch's draws anew for each element and keeps a float of noise for the backward pass, which
    shows in a training step with LoRA on all projections. A GPU has a kernel for it, which is used.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Dropout gave it
        """Zero elements with probability ``p`` and scale the others, in training only."""
        if not self.training or input.device.type != "cpu":
            return super().forward(input)
        return _Dropout.apply(input, self.p)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, probability: float) -> Tensor:
        dropped = round(probability * (1 << _BITS))
        share = dropped / (1 << _BITS)
        ctx.scale = 1 / (1 - share) if share < 1 else 0.0
        keep = _draw(hidden.numel()) >= dropped - (1 << _BITS - 1)
        keep = keep.view(hidden.shape)
        ctx.save_for_backward(keep)
        return _apply(hidden, keep, ctx.scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        return _apply(gradient, keep, ctx.scale), None


def _draw(count: int) -> Tensor:
    """Draw int16 of equal probability, shape (count,)."""
    words = torch.empty(-(-count * _BITS // 64), dtype=torch.int64)
    return words.random_(-(1 << 63), None).view(torch.int16)[:count]


def _apply(hidden: Tensor, keep: Tensor, scale: float) -> Tensor:
    # Two passes over floats are faster than one product of a float and a bool.
    return keep.to(hidden.dtype).mul_(scale).mul_(hidden)
