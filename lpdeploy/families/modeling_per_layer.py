"""LLaMA-family models whose layers have different numbers of heads and FFN channels.

This file is copied beside a checkpoint that lpdeploy pruned to per-layer widths, so that
``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`` loads it with nothing
but transformers. ``config.layer_widths`` holds one ``[num_key_value_heads, intermediate_size]``
a layer; every other field is that of the unpruned model. Each KV head keeps its query heads, so
the ratio of query to KV heads is the same in all layers.
"""

from typing import Any

from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)


def resize_layers(model: Any, layer_widths: list[list[int]]) -> None:
    """Give each decoder layer new Linears of its own widths (values are loaded afterwards)."""
    for layer, (kv_heads, channels) in zip(model.model.layers, layer_widths, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        kv_rows = kv_heads * attention.head_dim
        query_rows = kv_rows * attention.num_key_value_groups
        attention.q_proj = _with_rows(attention.q_proj, query_rows)
        attention.k_proj = _with_rows(attention.k_proj, kv_rows)
        attention.v_proj = _with_rows(attention.v_proj, kv_rows)
        attention.o_proj = _with_columns(attention.o_proj, query_rows)
        mlp.gate_proj = _with_rows(mlp.gate_proj, channels)
        mlp.up_proj = _with_rows(mlp.up_proj, channels)
        mlp.down_proj = _with_columns(mlp.down_proj, channels)


def _with_rows(linear: nn.Linear, rows: int) -> nn.Linear:
    return nn.Linear(linear.in_features, rows, bias=linear.bias is not None)


def _with_columns(linear: nn.Linear, columns: int) -> nn.Linear:
    return nn.Linear(columns, linear.out_features, bias=linear.bias is not None)


class PerLayerLlamaConfig(LlamaConfig):
    """A LlamaConfig with ``layer_widths``."""

    model_type = "lpdeploy_llama"


class PerLayerLlamaForCausalLM(LlamaForCausalLM):
    """LLaMA with per-layer widths."""

    config_class = PerLayerLlamaConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        resize_layers(self, config.layer_widths)


class PerLayerMistralConfig(MistralConfig):
    """A MistralConfig with ``layer_widths``."""

    model_type = "lpdeploy_mistral"


class PerLayerMistralForCausalLM(MistralForCausalLM):
    """Mistral with per-layer widths."""

    config_class = PerLayerMistralConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        resize_layers(self, config.layer_widths)


class PerLayerQwen2Config(Qwen2Config):
    """A Qwen2Config with ``layer_widths``."""

    model_type = "lpdeploy_qwen2"


class PerLayerQwen2ForCausalLM(Qwen2ForCausalLM):
    """Qwen2 with per-layer widths."""

    config_class = PerLayerQwen2Config

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        resize_layers(self, config.layer_widths)


class PerLayerQwen3Config(Qwen3Config):
    """A Qwen3Config with ``layer_widths``."""

    model_type = "lpdeploy_qwen3"


class PerLayerQwen3ForCausalLM(Qwen3ForCausalLM):
    """Qwen3 with per-layer widths."""

    config_class = PerLayerQwen3Config

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        resize_layers(self, config.layer_widths)
