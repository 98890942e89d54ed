"""Positions in ONNX Runtime's attention: how far a layer looks back, and tables of angles."""

import torch
from transformers import PretrainedConfig

from lpdeploy.engines.exporting import check_no_dynamic_rope, get_rope_type
from lpdeploy.errors import LpdeployError
from lpdeploy.families.groups import build_rotary_embedding


def get_window(config: PretrainedConfig, layer: int) -> int:
    """Return how many tokens a layer looks back on, -1 for all."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if window is None or (types and types[layer] != "sliding_attention"):
        return -1
    return int(window)


def compute_rotary_tables(
    config: PretrainedConfig, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute cosines and sines of all positions, as transformers does.

    Returns:
        Two tensors of shape (length, head_dim / 2), float32.

    Raises:
        LpdeployError: The angles depend on how long the text is, which a table cannot say.
    """
    check_no_dynamic_rope(config)
    if get_rope_type(config) == "longrope":
        raise LpdeployError(
            "Engine ort does not take rotary positions of type 'longrope', which change with the "
            "length of the text. Use `engine='onnx'`."
        )
    rotary = build_rotary_embedding(config)
    positions = torch.arange(length).unsqueeze(0)  # (1, L)
    cos, sin = rotary(torch.zeros(1), positions)  # (1, L, D), its halves alike
    half = cos.shape[-1] // 2
    return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
