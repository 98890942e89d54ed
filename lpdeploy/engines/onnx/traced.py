"""What torch's exporter traces: a causal LM whose KV cache goes in and out as flat tensors."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import create_masks_for_generate

SCATTER_OPSET = 24  # the first with TensorScatter


class ConcatModel(nn.Module):
    """A causal LM whose cache grows: present is past and new tokens, concatenated."""

    def __init__(self, causal_lm: nn.Module) -> None:
        super().__init__()
        self.causal_lm = causal_lm

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """Return logits (B, T, vocab) in float32, then key and value of each layer.

        Args:
            input_ids: Shape (B, T).
            attention_mask: Shape (B, P + T).
            position_ids: Shape (B, T).
            past: Key and value of each layer, (B, kv_heads, P, head_dim).
        """
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        return _run(self.causal_lm, input_ids, attention_mask, position_ids, cache)


class InPlaceModel(nn.Module):
    """A causal LM over cache buffers of one length S, in which a call replaces T positions.

    All rows of a batch have the same number of tokens, padding on the left included, so
    ``write_indices`` holds one value B times.
    """

    def __init__(self, causal_lm: nn.Module) -> None:
        super().__init__()
        self.causal_lm = causal_lm

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        write_indices: Tensor,
        past: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """Return logits (B, T, vocab) in float32, then the buffers of each layer, updated.

        Args:
            input_ids: Shape (B, T).
            attention_mask: Shape (B, S); what is beyond the new tokens is not looked at.
            position_ids: Shape (B, T).
            write_indices: Shape (B,): where the new tokens begin.
            past: Buffers of key and value of each layer, (B, kv_heads, S, head_dim).
        """
        layers: list[Any] = [
            _BufferLayer(keys, values, write_indices)
            for keys, values in zip(past[::2], past[1::2], strict=True)
        ]
        return _run(self.causal_lm, input_ids, attention_mask, position_ids, Cache(layers=layers))


class _BufferLayer(DynamicLayer):
    """The cache of one layer, of which TensorScatter replaces some positions."""

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor, write_indices: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.write_indices = write_indices
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        self.keys = self._scatter(self.keys, key_states)
        self.values = self._scatter(self.values, value_states)
        return self.keys, self.values

    def _scatter(self, buffer: Tensor, new: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(
            "TensorScatter",
            (buffer, new, self.write_indices),
            {"axis": 2},
            dtype=buffer.dtype,
            shape=buffer.shape,
            version=SCATTER_OPSET,
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002
        return self.keys.shape[2], 0

    def get_seq_length(self) -> Any:
        return self.write_indices[0]


def _run(
    causal_lm: Any, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Cache
) -> tuple[Tensor, ...]:
    output = causal_lm(
        input_ids=input_ids,
        attention_mask=_build_masks(causal_lm, input_ids, attention_mask, position_ids, cache),
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=True,
    )
    layers: list[Any] = cache.layers
    present = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    # Logits leave a half-precision graph as float32: every server and every sampler reads that,
    # numpy has no bfloat16, and the cast costs nothing beside the product it follows.
    return (output.logits.float(), *present)


def _build_masks(
    causal_lm: Any, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Cache
) -> Any:
    """Return the model's own masks, (B, 1, T, S), in which every token also sees itself.

    It does so anyway, except at padding, whose rows would be empty: what the Attention operator
    makes of these is up to the runtime, and a NaN in them would reach, through the next layer's
    values, tokens that give them no weight.
    """
    masks = create_masks_for_generate(
        config=causal_lm.config,
        inputs_embeds=causal_lm.get_input_embeddings()(input_ids),
        attention_mask=attention_mask,
        past_key_values=cache,
        position_ids=position_ids,
    )
    tokens = input_ids.shape[1]
    length, _ = cache.get_mask_sizes(tokens, 0)
    own = torch.arange(tokens) + cache.get_seq_length()
    itself = torch.arange(length)[None, :] == own[:, None]  # (T, S)
    if isinstance(masks, dict):  # by layer type, where a config has such types
        return {kind: mask | itself for kind, mask in masks.items()}
    return masks | itself
