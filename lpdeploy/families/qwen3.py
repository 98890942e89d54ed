"""Qwen3: a LLaMA that normalises each query and key head before it is rotated.

One weight of the norm serves all heads, so removing heads leaves it as it is.
"""

from typing import Any

from lpdeploy.families.record import Family, GgufArchitecture


def load_classes() -> tuple[Any, Any]:
    """Import the stock classes."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3Config, Qwen3ForCausalLM


def load_per_layer_classes() -> tuple[Any, Any]:
    """Import the classes whose layers differ."""
    from lpdeploy.families import modeling_per_layer

    return modeling_per_layer.PerLayerQwen3Config, modeling_per_layer.PerLayerQwen3ForCausalLM


QWEN3 = Family(
    model_type="qwen3",
    load_classes=load_classes,
    load_per_layer_classes=load_per_layer_classes,
    gguf=GgufArchitecture(name="QWEN3"),
)
