"""The cross-entropy of a frozen head, without ever holding the logits of all tokens."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lpdeploy.data.batches import IGNORED

# Logits that exist at a time, in float32: enough tokens for a product at full speed.
_CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 128 << 20}


def compute_loss(hidden: Tensor, head: Tensor, labels: Tensor, *, targets: int) -> Tensor:
    """Compute the next-token cross-entropy of a causal LM from what goes into its head.

    The same as transformers' loss, whose logits, log-softmax and two gradients are as large as the
    vocabulary for every token. Here they exist for a chunk of tokens; the gradient of the chunk's
    hidden states is made at once, which costs no product more, since the head is frozen.

    Args:
        hidden: After the last norm, shape (B, T, hidden).
        head: Weight of the head, shape (vocab, hidden); gets no gradient.
        labels: Shape (B, T), int64; -100 is left out. Token t predicts label t + 1.
        targets: What the sum over the tokens is divided by.

    Returns:
        A number in nats, float32.
    """
    following = functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    return _ChunkedLoss.apply(hidden, head, following) / targets


def count_chunk_tokens(vocab_size: int, device: str) -> int:
    """Return the tokens whose logits exist at a time."""
    return max(1, _CHUNK_BYTES[device] // (4 * vocab_size))


class _ChunkedLoss(torch.autograd.Function):
    """The sum over the tokens; keeps its gradient with respect to ``hidden``."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        flat, labels = hidden.flatten(0, 1), labels.flatten()
        size = count_chunk_tokens(head.shape[0], hidden.device.type)
        gradient = torch.empty_like(flat, dtype=head.dtype) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), device=hidden.device)
        for start in range(0, len(flat), size):
            part = slice(start, start + size)
            loss, slope = _compute_chunk(flat[part].to(head.dtype) @ head.t(), labels[part])
            total += loss
            if gradient is not None:
                torch.mm(slope.to(head.dtype), head, out=gradient[part])
            del slope  # before the next chunk's logits
        if gradient is not None:
            ctx.save_for_backward(gradient.to(hidden.dtype).view_as(hidden))
        return total

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer.to(gradient.dtype), None, None


def _compute_chunk(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of a chunk, and its gradient with respect to the logits, in their place.

    Args:
        logits: Shape (tokens, vocab); overwritten if float32.
        labels: Shape (tokens,).
    """
    slope = logits.float()
    real = labels != IGNORED
    place = labels.clamp_min(0)[:, None]
    slope -= slope.amax(dim=1, keepdim=True)
    chosen = slope.gather(1, place)
    sums = slope.exp_().sum(dim=1, keepdim=True)
    loss = ((sums.log() - chosen).squeeze(1) * real).sum()
    slope /= sums
    slope.scatter_add_(1, place, slope.new_full(place.shape, -1.0))
    slope *= real[:, None]
    return loss, slope
