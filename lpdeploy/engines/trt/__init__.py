"""An engine that TensorRT or TensorRT-RTX builds for one kind of GPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lpdeploy.engines.engine import Engine, TritonBackend

if TYPE_CHECKING:
    from lpdeploy.engines.contract import Contract
    from lpdeploy.engines.runner import Runner


def _export(model_folder: Path, output: Path, **options: Any) -> Contract:
    from lpdeploy.engines.trt.exporter import export_tensorrt

    return export_tensorrt(model_folder, output, **options)


def _load(folder: Path, *, device: str | None = None) -> Runner:
    from lpdeploy.engines.trt.runner import load_trt_runner

    return load_trt_runner(folder, device=device or "cuda")


def _find_library(_device: str) -> object:
    from lpdeploy.engines.trt.library import load_library

    return load_library()


ENGINE = Engine(
    name="trt",
    summary="a TensorRT or TensorRT-RTX engine for batches up to `max_batch` and sequences up to "
    "`max_seq_len`, which runs only with the library version and on the kind of GPU that built it",
    load=_load,
    find_library=_find_library,
    needs_gpu=True,
    export=_export,
    contract_file="engine.json",
    main_file="model.engine",
    precisions=("fp32", "fp16", "bf16"),
    options=("opset", "max_batch", "max_seq_len"),
    triton=TritonBackend("tensorrt", batches=True, joins=False),
)
