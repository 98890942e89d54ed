"""Weights are numbers: NaN and infinity are refused where they arise, by the name of the weight."""

import torch
from torch import Tensor

from lpdeploy.errors import ArtifactError, LpdeployError

_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def check_finite(tensor: Tensor, *, name: str) -> None:
    """Check a weight as it is stored.

    Raises:
        ArtifactError: It holds NaN or infinity.
    """
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise ArtifactError(
            f"{name} holds NaN or infinity, so the model computes nothing. Give a sound checkpoint."
        )


def round_weight(tensor: Tensor, dtype: torch.dtype, *, name: str, fix: str) -> Tensor:
    """Round a weight to another precision.

    Args:
        tensor: What is rounded.
        dtype: What to.
        name: Of the weight.
        fix: Sentence that says what to do where ``dtype`` cannot hold it.

    Raises:
        ArtifactError: The weight holds NaN or infinity.
        LpdeployError: It is finite, and too large for ``dtype``.
    """
    rounded = tensor.to(dtype)
    if not rounded.isfinite().all():
        check_finite(tensor, name=name)
        largest, limit = tensor.abs().max().item(), torch.finfo(dtype).max
        raise LpdeployError(
            f"{name} holds {largest:.6g}, and {_NAMES.get(dtype, dtype)} ends at {limit:.6g}. {fix}"
        )
    return rounded
