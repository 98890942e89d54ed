"""torch.compile, once no more groups go: each new width would be compiled anew."""

from typing import Any

import torch

from lpdeploy.errors import LpdeployError, quote_error

BACKEND = "inductor"


def check_compile(device: torch.device) -> None:
    """Compile something small, so that a run does not fail in its midst for want of a compiler.

    Raises:
        LpdeployError: torch cannot compile for this device here.
    """
    try:
        torch.compile(lambda x: x + 1, backend=BACKEND)(torch.zeros(8, device=device))
    except Exception as error:  # compilers fail in ways of their own
        raise LpdeployError(
            f"torch cannot compile for {device.type} here: {quote_error(error)}. Install a C++ "
            "compiler (and Triton, on a GPU), or leave out `compile`."
        ) from error


def apply_compile(model: Any) -> None:
    """Let each decoder layer be compiled when it runs next.

    Layers of the same widths share what is compiled, so it takes as long for 32 layers as for one.

    Args:
        model: The causal LM inside peft.
    """
    for layer in model.model.layers:
        layer.compile(backend=BACKEND)
