"""A checkpoint with its projections in FP8, stored as vLLM's ``compressed-tensors`` format has it.

Written here, since the libraries that write it pin other versions of transformers than ours, and it
is little: a number of 8 bits for each weight, and a scale for each row.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lpdeploy.artifacts import save_json
from lpdeploy.families.groups import LINEARS
from lpdeploy.models.find import list_weight_files
from lpdeploy.models.finite import check_finite
from lpdeploy.records import load_record

FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FP8).max
_SCALE = "_scale"
_INDEX = "model.safetensors.index.json"
_ENDS = tuple(f".{name}.weight" for name in LINEARS)
_SHARED = {"num_bits": 8, "type": "float", "symmetric": True}
QUANTIZATION: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**_SHARED, "strategy": "channel", "dynamic": False},
            "input_activations": {**_SHARED, "strategy": "token", "dynamic": True},
            "output_activations": None,
        }
    },
}
"""What its config says: weights by row, activations by token as they come, the head as it is."""


def save_fp8(model: Path, folder: Path) -> None:
    """Write the weights and the config of a checkpoint, projections in FP8.

    Files keep their names, and one is in memory at a time, in its new size.

    Args:
        model: A Hugging Face folder.
        folder: To fill.

    Raises:
        ArtifactError: A weight is missing, damaged or no finite number.
    """
    places: dict[str, str] = {}
    total = 0
    for file in list_weight_files(model):
        tensors = _round_file(file)
        save_file(tensors, folder / file.name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file.name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(set(places.values())) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        save_json(folder / _INDEX, index)
    config = load_record(dict[str, Any], model / "config.json", fix="Copy the checkpoint anew.")
    save_json(folder / "config.json", {**config, "quantization_config": QUANTIZATION})


def _round_file(file: Path) -> dict[str, Tensor]:
    """Read a file of weights, and round those of projections."""
    tensors: dict[str, Tensor] = {}
    with safe_open(file, framework="pt") as stored:
        for name in stored.keys():  # noqa: SIM118 - it is no dict
            tensor = stored.get_tensor(name)
            if not name.endswith(_ENDS):
                tensors[name] = tensor
                continue
            check_finite(tensor, name=name)
            tensors[name], tensors[f"{name}{_SCALE}"] = round_rows(tensor)
    return tensors


def round_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix to FP8 (E4M3), so that the largest number of each row is the largest of FP8.

    Args:
        weight: Shape (out, in).

    Returns:
        The numbers, shape (out, in), and scales, shape (out, 1), in the type of ``weight``, as
        readers expect it.
    """
    largest = weight.float().abs().amax(1, keepdim=True)
    scale = (largest / _LARGEST).to(weight.dtype)
    # Below its smallest normal number a type has few digits; FP8 itself has small numbers enough.
    scale = scale.clamp(min=torch.finfo(weight.dtype).tiny)
    scale = torch.where(largest == 0, torch.ones_like(scale), scale)  # a row of zeros
    numbers = (weight.float() / scale.float()).clamp(-_LARGEST, _LARGEST)
    return numbers.to(FP8), scale
