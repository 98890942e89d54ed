"""Mistral: a LLaMA without biases, with a sliding window."""

from typing import Any

from lpdeploy.families.record import GGUF_LLAMA, Family


def load_classes() -> tuple[Any, Any]:
    """Import the stock classes."""
    from transformers import MistralConfig, MistralForCausalLM

    return MistralConfig, MistralForCausalLM


def load_per_layer_classes() -> tuple[Any, Any]:
    """Import the classes whose layers differ."""
    from lpdeploy.families import modeling_per_layer

    return modeling_per_layer.PerLayerMistralConfig, modeling_per_layer.PerLayerMistralForCausalLM


MISTRAL = Family(
    model_type="mistral",
    load_classes=load_classes,
    load_per_layer_classes=load_per_layer_classes,
    biased=(),
    gguf=GGUF_LLAMA,
)
