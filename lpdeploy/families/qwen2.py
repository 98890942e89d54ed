"""Qwen2: a LLaMA with biases on queries, keys and values."""

from typing import Any

from lpdeploy.families.record import GGUF_LLAMA, Family


def load_classes() -> tuple[Any, Any]:
    """Import the stock classes."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2Config, Qwen2ForCausalLM


def load_per_layer_classes() -> tuple[Any, Any]:
    """Import the classes whose layers differ."""
    from lpdeploy.families import modeling_per_layer

    return modeling_per_layer.PerLayerQwen2Config, modeling_per_layer.PerLayerQwen2ForCausalLM


QWEN2 = Family(
    model_type="qwen2",
    load_classes=load_classes,
    load_per_layer_classes=load_per_layer_classes,
    biased=("q_proj", "k_proj", "v_proj"),
    # llama.cpp's own `qwen2` wants as many query rows as the hidden size, which a model without
    # some of its heads does not have. Its `llama` may have biases.
    gguf=GGUF_LLAMA,
)
