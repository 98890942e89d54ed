"""The loss behind a frozen head, without ever holding the logits of all tokens."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lpdeploy.data.batches import IGNORED

# Logits that exist at a time, in float32: enough tokens for a product at full speed.
_CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 128 << 20}


@dataclass(frozen=True)
class Taught:
    """What a teacher expects behind each token, and how much it counts.

    Attributes:
        log_probs: Of its most probable tokens at ``temperature``, and behind them that of all
            others together, shape (B, T, k + 1).
        ids: Which tokens these are, shape (B, T, k), int64.
        weight: Of the divergence from the teacher; the cross-entropy has the rest. In (0, 1].
        temperature: By which logits are divided.
    """

    log_probs: Tensor
    ids: Tensor
    weight: float
    temperature: float


def compute_loss(
    hidden: Tensor, head: Tensor, labels: Tensor, *, targets: int, taught: Taught | None = None
) -> Tensor:
    """Compute the next-token loss of a causal LM from what goes into its head.

    Without a teacher, that is the cross-entropy. With one, it is
    ``(1 - weight) * cross_entropy + weight * temperature^2 * KL(teacher || model)``, where the
    divergence has one term for each of the teacher's most probable tokens, and one for all others.

    The same as transformers' loss, whose logits, log-softmax and two gradients are as large as the
    vocabulary for every token. Here they exist for a chunk of tokens; the gradient of the chunk's
    hidden states is made at once, which costs no product more, since the head is frozen.

    Args:
        hidden: After the last norm, shape (B, T, hidden).
        head: Weight of the head, shape (vocab, hidden); gets no gradient.
        labels: Shape (B, T), int64; -100 is left out. Token t predicts label t + 1.
        targets: What the sum over the tokens is divided by.
        taught: What the teacher expects behind each token; None without one.

    Returns:
        A number in nats, float32.

    Source:
        Hinton et al., arXiv:1503.02531, section 2: the factor temperature^2 keeps the size of the
        gradient. One term for the rest of the vocabulary is ours.
    """
    following = functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    return _ChunkedLoss.apply(hidden, head, following, taught) / targets


def count_chunk_tokens(vocab_size: int, device: str) -> int:
    """Return the tokens whose logits exist at a time."""
    return max(1, _CHUNK_BYTES[device] // (4 * vocab_size))


class _ChunkedLoss(torch.autograd.Function):
    """The sum over the tokens; keeps its gradient with respect to ``hidden``."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, taught: Taught | None
    ) -> Tensor:
        flat, labels = hidden.flatten(0, 1), labels.flatten()
        size = count_chunk_tokens(head.shape[0], hidden.device.type)
        gradient = torch.empty_like(flat, dtype=head.dtype) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), device=hidden.device)
        for start in range(0, len(flat), size):
            part = slice(start, start + size)
            own = None if taught is None else _select(taught, part)
            loss, slope = _compute_chunk(flat[part].to(head.dtype) @ head.t(), labels[part], own)
            total += loss
            if gradient is not None:
                torch.mm(slope.to(head.dtype), head, out=gradient[part])
            del slope  # before the next chunk's logits
        if gradient is not None:
            ctx.save_for_backward(gradient.to(hidden.dtype).view_as(hidden))
        return total

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer.to(gradient.dtype), None, None, None


def _select(taught: Taught, part: slice) -> Taught:
    ids = taught.ids.flatten(0, 1)[part]
    log_probs = taught.log_probs.flatten(0, 1)[part].float()
    return replace(taught, log_probs=log_probs, ids=ids)


def _compute_chunk(logits: Tensor, labels: Tensor, taught: Taught | None) -> tuple[Tensor, Tensor]:
    """Return the loss of a chunk, and its gradient with respect to the logits, in their place.

    Args:
        logits: Shape (tokens, vocab); overwritten if float32.
        labels: Shape (tokens,).
        taught: Of these tokens.
    """
    slope = logits.float()
    real = labels != IGNORED
    place = labels.clamp_min(0)[:, None]
    slope -= slope.amax(dim=1, keepdim=True)
    chosen = slope.gather(1, place)
    weight = 0.0 if taught is None else taught.weight
    cooled = None
    if taught is not None and taught.temperature != 1:
        cooled = torch.softmax(slope / taught.temperature, dim=1)
    sums = slope.exp_().sum(dim=1, keepdim=True)
    losses = (1 - weight) * (sums.log() - chosen).squeeze(1)
    slope /= sums
    if taught is not None:
        losses += _add_divergence(slope, slope if cooled is None else cooled, taught)
    slope.scatter_add_(1, place, slope.new_full(place.shape, weight - 1.0))
    slope *= real[:, None]
    return (losses * real).sum(), slope


def _add_divergence(slope: Tensor, probs: Tensor, taught: Taught) -> Tensor:
    """Turn probabilities into the gradient of both losses but for the label's part.

    Args:
        slope: The probabilities at temperature 1, shape (tokens, vocab); overwritten.
        probs: Those at the teacher's temperature; may be ``slope``; overwritten.
        taught: Of these tokens.

    Returns:
        The weighted divergence of each token, shape (tokens,).
    """
    weight, temperature = taught.weight, taught.temperature
    own, tiny = probs.gather(1, taught.ids), torch.finfo(probs.dtype).tiny
    logs = taught.log_probs.log_softmax(dim=1)  # they are stored in half precision
    wanted, rest = logs.exp().split((taught.ids.shape[1], 1), dim=1)
    # Not 1 - own.sum(): where that is near 0, it would be only rounding.
    own_rest = probs.scatter_(1, taught.ids, 0.0).sum(dim=1, keepdim=True).clamp_min(tiny)
    own_logs = torch.cat([own.clamp_min(tiny), own_rest], dim=1).log()
    divergence = (logs.exp() * (logs - own_logs)).sum(dim=1)
    # d KL / d logit is (own - wanted) / temperature for the k tokens, and for all others their
    # probability times (1 - rest / own_rest) / temperature.
    share = weight * temperature
    among = own - wanted
    if probs is slope:
        named = (1 - weight) * own + share * among
        slope *= (1 - weight) + share * (1 - rest / own_rest)
        slope.scatter_(1, taught.ids, named)
    else:
        probs *= share * (1 - rest / own_rest)
        probs.scatter_(1, taught.ids, share * among)
        slope.mul_(1 - weight).add_(probs)
    return weight * temperature**2 * divergence
