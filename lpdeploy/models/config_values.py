"""What the fields of a config.json may be.

transformers checks types, but not whether a model can have the values: a negative width, a million
layers or an unknown rope end somewhere in its code, or never. The bounds are far above any model.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_COUNTS = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_hidden_layers": 1000,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "head_dim": 1 << 14,
    "max_position_embeddings": 1 << 30,
}
"""Field -> the largest value."""
_OPTIONAL = ("head_dim", "num_key_value_heads", "dtype", "rope_parameters", "layer_widths")
_ROPES = ("default", *ROPE_INIT_FUNCTIONS)
_POSITIVE = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor")


def find_bad_value(config: PretrainedConfig) -> str | None:
    """Say which field has a value that no model can have, and what it may be; None if all are good.

    Args:
        config: A config of a supported family, stock or with widths per layer.
    """
    for name, check in _CHECKS.items():
        value = getattr(config, name, None)
        expected = None if value is None and name in _OPTIONAL else check(value)
        if expected is not None:
            return f"{name} is {_show(value)}, not {expected}"
    return None


def _count(most: int) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        good = type(value) is int and 1 <= value <= most
        return None if good else f"1 to {most:,}"

    return check


def _check_dtype(value: Any) -> str | None:
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    return None if dtype in DTYPES else "float32, float16 or bfloat16"


def _check_epsilon(value: Any) -> str | None:
    return None if _is_number(value) and 0 < value < 1 else "a number between 0 and 1"


def _check_dropout(value: Any) -> str | None:
    return None if _is_number(value) and 0 <= value < 1 else "a number from 0 to 1"


def _check_activation(value: Any) -> str | None:
    return None if isinstance(value, str) and value in ACT2FN else "the name of an activation"


def _check_rope(value: Any) -> str | None:
    if not isinstance(value, dict):
        return "an object"
    if value.get("rope_type", "default") not in _ROPES:
        return f"of a rope_type that is one of {', '.join(_ROPES)}"
    for name in _POSITIVE:
        if name in value and not (_is_number(value[name]) and value[name] > 0):
            return f"with a positive {name}"
    return None


def _check_widths(value: Any) -> str | None:
    pairs = isinstance(value, list) and all(
        isinstance(pair, list | tuple)
        and len(pair) == 2
        and all(type(width) is int and width >= 1 for width in pair)
        for pair in value
    )
    return None if pairs else "a list of [KV heads, channels], each at least 1"


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _show(value: Any) -> str:
    return repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:80]}..."


_CHECKS: dict[str, Callable[[Any], str | None]] = {
    **{name: _count(most) for name, most in _COUNTS.items()},
    "dtype": _check_dtype,
    "rms_norm_eps": _check_epsilon,
    "attention_dropout": _check_dropout,
    "hidden_act": _check_activation,
    "rope_parameters": _check_rope,
    "layer_widths": _check_widths,
}
