"""ONNX Runtime: sessions, its providers, its tensors and its quantizer. Named nowhere else."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lpdeploy.engines.contract import Contract
from lpdeploy.errors import ArtifactError, MissingDependencyError, quote_error

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_EXTRAS = {"cpu": "cpu", "cuda": "gpu"}
_ONNX_TYPES = {"float32": 1, "float16": 10, "bfloat16": 16}  # onnx.TensorProto.DataType
_TORCH_TYPES = {
    torch.float32: 1,
    torch.float16: 10,
    torch.bfloat16: 16,
    torch.int32: 6,
    torch.int64: 7,
}
FIX = "Export the model again with 'lpdeploy export'."
"""What a user does where an export cannot be used."""


def split_device(device: str) -> tuple[str, int]:
    """Split ``cuda:1`` into ``("cuda", 1)``.

    Raises:
        ValueError: It is neither cpu nor cuda.
    """
    kind, _, index = device.partition(":")
    if kind not in _PROVIDERS or not (index.isdigit() or not index):
        raise ValueError(f"device is {device!r}; it must be cpu, cuda or cuda:N")
    return kind, int(index or 0)


def build_session(folder: Path, device: str) -> Any:
    """Open ``model.onnx`` of a folder on a device, there or not at all.

    Raises:
        ArtifactError: ONNX Runtime cannot load the graph.
        MissingDependencyError: It, or its provider for ``device``, is not installed.
    """
    kind, index = split_device(device)
    runtime = import_runtime(kind)
    provider = _PROVIDERS[kind]
    try:
        session = runtime.InferenceSession(
            folder / "model.onnx",
            _build_options(runtime),
            providers=[(provider, {"device_id": str(index)} if kind == "cuda" else {})],
            enable_fallback=0,  # its fallback prints, and goes on without the provider
        )
    except _list_load_errors() as error:
        raise ArtifactError(
            f"ONNX Runtime cannot load '{folder}': {quote_error(error)}. {FIX}"
        ) from error
    if session.get_providers()[0] != provider:
        raise MissingDependencyError(
            f"ONNX Runtime has {provider} but cannot start it here: its CUDA and cuDNN libraries "
            "or the driver do not match. Install with: pip install 'lpdeploy[gpu]'."
        )
    return session


def check_computes(folder: Path, contract: Contract, kind: str) -> None:
    """Refuse a graph in bf16 on a CPU, for which ONNX Runtime has no operators there.

    Raises:
        ArtifactError: It is one.
    """
    dtypes = {spec.dtype for spec in contract.inputs}
    if kind == "cpu" and (contract.precision == "bf16" or "bfloat16" in dtypes):
        raise ArtifactError(
            f"'{folder}' computes in bf16, which ONNX Runtime does not on a CPU. Use "
            "`device='cuda'`, or export in another precision."
        )


def import_runtime(kind: str) -> Any:
    """Import ONNX Runtime and check that it can run on ``cpu`` or ``cuda``.

    Raises:
        MissingDependencyError: It, or its provider, is not installed.
    """
    extra = _EXTRAS[kind]
    try:
        import onnxruntime
    except ImportError:
        raise MissingDependencyError(
            "onnxruntime is not installed; the ONNX engine needs it. "
            f"Install with: pip install 'lpdeploy[{extra}]'."
        ) from None
    if _PROVIDERS[kind] not in onnxruntime.get_available_providers():
        raise MissingDependencyError(
            f"This onnxruntime {onnxruntime.__version__} has no {_PROVIDERS[kind]}. "
            f"Install with: pip uninstall onnxruntime && pip install 'lpdeploy[{extra}]'."
        )
    return onnxruntime


def _list_load_errors() -> tuple[type[Exception], ...]:
    # They have no common base below Exception.
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile",
             "NotImplemented", "RuntimeException")  # fmt: skip
    return tuple(getattr(state, name) for name in names)


def _build_options(runtime: Any) -> Any:
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors only: a warning a node floods the terminal
    options.intra_op_num_threads = torch.get_num_threads()
    return options


def share_tensor(value: Any) -> Tensor:
    """Return an ``OrtValue`` as a tensor over the same memory where torch can reach it."""
    # Without a CUDA build of torch there is no tensor over the GPU's memory: copy it then.
    if value.device_name() == "cpu" or torch.cuda.is_available():
        return torch.from_dlpack(value)
    return torch.from_numpy(value.numpy())


def build_empty_value(shape: list[int], dtype: str) -> Any:
    """Return an ``OrtValue`` on the CPU, uninitialized."""
    from onnxruntime import OrtValue

    return OrtValue.ortvalue_from_shape_and_type(shape, _ONNX_TYPES[dtype])


def bind_tensor(binding: Any, name: str, tensor: Tensor, *, output: bool = False) -> None:
    """Let a graph read or write a contiguous tensor where it lies; it must outlive the binding."""
    kind = tensor.device.type
    bind = binding.bind_output if output else binding.bind_input
    dtype = _TORCH_TYPES[tensor.dtype]
    bind(name, kind, tensor.device.index or 0, dtype, list(tensor.shape), tensor.data_ptr())


def quantize_blocks(weight: Tensor, *, bits: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Quantize a projection for ``MatMulNBits``, symmetrically, with ONNX Runtime's own quantizer.

    Args:
        weight: Shape (out, in), float32; ``block_size`` divides ``in``.
        bits: 4 or 8.
        block_size: Consecutive inputs that share a scale.

    Returns:
        Packed, shape (out, in / block, block * bits / 8), uint8; scales, shape (out, in / block),
        float32.
    """
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        DefaultWeightOnlyQuantizer,
    )

    config = DefaultWeightOnlyQuantConfig(block_size=block_size, is_symmetric=True, bits=bits)
    columns = weight.T.contiguous().numpy()  # (out, in) -> (in, out), as in a MatMul
    packed, scales, _ = DefaultWeightOnlyQuantizer(config).qbits_block_quant(columns)
    return torch.from_numpy(packed), torch.from_numpy(scales)
