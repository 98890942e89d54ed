"""The weights in a graph of ONNX Runtime's operators, read back and unpacked.

Written apart from the exporter and from ONNX Runtime's quantizer, which it checks.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import to_torch_dtype
from torch import Tensor, nn

from lpdeploy.engines.weight_checks import (
    WeightsCheck,
    is_rounded,
    list_expected,
    list_initializers,
)
from lpdeploy.models.adapters import get_base_linear
from lpdeploy.models.weight_files import EMBEDDING, HEAD

_LARGEST = 128
"""Steps of the largest number, which a rounded scale moves by as many of its rounding errors."""
_SLACK = 1e-2


def check_weights(
    export: Path, model_folder: Path, *, adapter: Path | None, precision: str, a: str, b: str
) -> WeightsCheck:
    """Compare every weight of a checkpoint with its export, where the names are those of weights.

    A float must be the expected one, rounded. A number of 8 or 4 bits must be less than one step of
    its block from it: the largest of a block is at an end of the range, which is one step longer
    below zero than above it.

    Args:
        export: The export.
        model_folder: The checkpoint.
        adapter: The adapter that stays beside it, if one does.
        precision: Not needed: the constants have it.
        a: Name of the stage of the checkpoint.
        b: Name of the export.
    """
    del precision
    constants = list_initializers(export / "model.onnx")
    expected = list_expected(model_folder, adapter, scaled=True)
    wrong = dict.fromkeys(expected, True)  # until it is found
    if expected.get(HEAD) == expected.get(EMBEDDING):  # one weight, which a graph may hold once
        wrong.pop(HEAD, None)
    for name in constants:
        parts = _strip(name).split("+")
        if name.endswith(".scales") or not set(parts) <= expected.keys():
            continue
        weights = [expected[part]() for part in parts]
        rows = [len(weight) for weight in weights]
        for part, weight, (found, step) in zip(
            parts, weights, _read(constants, name, rows), strict=True
        ):
            wrong[part] = not _is_near(found, weight, step)
    return WeightsCheck.summarize(a, b, wrong)


def _strip(name: str) -> str:
    """Return the names of weights, joined by +, that a constant is named after."""
    return name.removesuffix(".q4").removesuffix(".q8").removesuffix(".scales")


def _read(
    constants: Mapping[str, ir.TensorProtocol], name: str, rows: list[int]
) -> list[tuple[Tensor, Tensor | None]]:
    """Read the weights in a constant, each with the step of every number if it is packed."""
    if name != _strip(name):
        weight, step = _unpack(constants, name)
        steps: tuple[Tensor | None, ...] = torch.split(step, rows)
    else:
        weight, steps = _load(constants[name]), (None,) * len(rows)
        # A MatMul takes its weight as (in, out), and a Gather takes the embedding as it is.
        weight = weight if weight.ndim == 1 or name == EMBEDDING else weight.T
    return list(zip(torch.split(weight, rows), steps, strict=True))


def _load(constant: ir.TensorProtocol) -> Tensor:
    dtype = to_torch_dtype(constant.dtype)
    data = torch.frombuffer(bytearray(constant.tobytes()), dtype=dtype)
    return data.reshape(tuple(constant.shape.numpy()))


def _unpack(constants: Mapping[str, ir.TensorProtocol], name: str) -> tuple[Tensor, Tensor]:
    packed, stored = _load(constants[name]), _load(constants[f"{_strip(name)}.scales"])
    scales, scales_dtype = stored.float(), stored.dtype
    if name.endswith(".q4"):  # two numbers a byte, the lower half first
        codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(2).float() - 8
    else:
        codes = packed.float() - 128
    # Of a scale that was rounded to half precision, the step may be as much longer.
    rounding = torch.finfo(scales_dtype).eps / 2 * _LARGEST
    step = (1 + rounding) * scales.abs().unsqueeze(-1).expand_as(codes)
    return (codes * scales.unsqueeze(-1)).flatten(1), step.flatten(1)


def _is_near(found: Tensor, expected: Tensor, step: Tensor | None) -> bool:
    if step is None:
        return is_rounded(found, expected.float())
    if found.shape != expected.shape:
        return False
    return bool(((found - expected.float()).abs() <= (1 + _SLACK) * step).all())


def apply_packed(export: Path, model: Any, *, round_activations: bool) -> None:
    """Put the packed weights of an export, unpacked, in the place of those of a model in torch.

    Args:
        export: The export.
        model: A causal LM, or a ``PeftModel`` around one.
        round_activations: Whether the products with these weights also round their inputs to 8
            bits, each block of a row by its own largest value, as ONNX Runtime does on a CPU.
    """
    constants = list_initializers(export / "model.onnx")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for name in constants:
        if name == _strip(name) or name.endswith(".scales"):
            continue
        # A tied head is packed under the embedding's name, and tokens are looked up in it as well.
        names = [HEAD if part == EMBEDDING else part for part in _strip(name).split("+")]
        modules = [part.removesuffix(".weight") for part in names]
        linears = [get_base_linear(base.get_submodule(module)) for module in modules]
        weight, _ = _unpack(constants, name)
        for linear, own in zip(
            linears, torch.split(weight, [linear.out_features for linear in linears]), strict=True
        ):
            linear.weight = nn.Parameter(own.clone(), requires_grad=False)
            if names == [HEAD] and _strip(name) == EMBEDDING:
                base.get_input_embeddings().weight = linear.weight
            if round_activations:
                block = weight.shape[1] // constants[name].shape.numpy()[1]
                linear.register_forward_pre_hook(partial(_round_input, block))


def _round_input(block: int, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
    blocks = inputs[0].unflatten(-1, (-1, block))
    step = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return (((blocks / step).round() * step).flatten(-2),)
