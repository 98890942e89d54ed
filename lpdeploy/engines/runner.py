"""The one interface over torch, ONNX Runtime and TensorRT."""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Output(NamedTuple):
    """What one forward pass gives.

    Attributes:
        logits: Shape (B, T, vocab), or (B, 1, vocab) where only the last was asked for; float32,
            on the CPU or the runner's device.
        past: The KV cache so far, opaque; hand it to the next call of the same runner.
    """

    logits: Tensor
    past: Any


class Runner(Protocol):
    """A causal LM on some engine.

    Attributes:
        name: Name of the engine.
        precision: ``fp32``, ``fp16``, ``bf16``, ``int8`` or ``int4``.
        vocab_size: Width of the logits.
        max_positions: Longest past + present in tokens.
    """

    name: str
    precision: str
    vocab_size: int
    max_positions: int

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor,
        past: Any = None,
        last_only: bool = False,
        reserve: int = 0,
    ) -> Output:
        """Run T new tokens after a past of P tokens: a prefill where P is 0, else a decode.

        Args:
            input_ids: Shape (B, T), int64.
            attention_mask: Shape (B, P + T), int64; 0 at padding, which stands on the left.
            past: ``Output.past`` of the previous call, or None for a prefill. It is taken over:
                an engine may write into it, so that no two calls can go on from the same past.
            last_only: Only the logits of the last token are wanted; an engine need not compute
                the others.
            reserve: Tokens that will follow in later calls. An engine whose cache is a buffer
                makes it so long at once; it grows, with a copy, where more come.
        """
        ...


def compute_position_ids(attention_mask: Tensor, num_tokens: int) -> Tensor:
    """Count positions from the first token that is not padding.

    Args:
        attention_mask: Shape (B, P + T).
        num_tokens: T, the new tokens.

    Returns:
        Shape (B, T), int64; 0 at padding.
    """
    positions = attention_mask.long().cumsum(dim=1) - 1
    return positions.clamp_min(0)[:, -num_tokens:]


def pad_left(sequences: list[list[int]], *, pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Stack sequences of different lengths, padding on the left.

    Returns:
        (input_ids, attention_mask), both (B, longest), int64.
    """
    longest = max(len(ids) for ids in sequences)
    ids = [[pad_id] * (longest - len(row)) + row for row in sequences]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in sequences]
    return torch.tensor(ids), torch.tensor(mask)
