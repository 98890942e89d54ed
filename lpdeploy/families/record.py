"""What a family of models is: its classes, its biases, and what others call it.

All families share the decoder that ``groups.py`` describes: projections of the same names, rotary
positions, RMS norms, and attention whose KV heads serve one or more query heads.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PER_LAYER_MODULE = "lpdeploy.families.modeling_per_layer"
"""Our own classes, whose layers have different widths."""

Fields = dict[str, Any]
"""Fields of a config by name."""


@dataclass(frozen=True, kw_only=True)
class GgufArchitecture:
    """An architecture of llama.cpp.

    Attributes:
        name: Name of the member of ``gguf.MODEL_ARCH``.
        interleaved: It rotates row 2i of a head with row 2i + 1; transformers rotates row i with
            row i + head_dim / 2.
        rope_factors: It reads a factor for each rotary frequency.
        output_bias: It has a place for the bias of o_proj.
    """

    name: str
    interleaved: bool = False
    rope_factors: bool = False
    output_bias: bool = False


GGUF_LLAMA = GgufArchitecture(name="LLAMA", interleaved=True, rope_factors=True, output_bias=True)
"""What llama.cpp runs most families as."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models that lpdeploy prunes.

    Attributes:
        model_type: Of its config.
        load_classes: Imports and returns its config class and its causal LM.
        load_per_layer_classes: Likewise, of models whose layers have different widths. The file
            of these classes is copied beside a checkpoint, so it may import transformers only.
            None if there are none: all layers keep the same widths.
        biased: Projections that have a bias in every model of the family. None if its config
            says so, in ``attention_bias`` and ``mlp_bias``.
        carry_odd_heads: Takes the fields of a config whose head count does not divide the hidden
            size, and returns a model type and its fields that compute the same; None if there
            are none such. The attribute is None if the family's own config allows such counts.
        genai: Model type that ONNX Runtime GenAI runs it as; None for its own.
        gguf: What llama.cpp runs it as; None if it does not.
    """

    model_type: str
    load_classes: Callable[[], tuple[Any, Any]]
    load_per_layer_classes: Callable[[], tuple[Any, Any]] | None = None
    biased: tuple[str, ...] | None = None
    carry_odd_heads: Callable[[Fields], tuple[str, Fields] | None] | None = None
    genai: str | None = None
    gguf: GgufArchitecture | None = None


def import_classes(module: str, stem: str) -> tuple[Any, Any]:
    """Import a config class and its causal LM, which share the first part of their names."""
    found = importlib.import_module(module)
    return getattr(found, f"{stem}Config"), getattr(found, f"{stem}ForCausalLM")
