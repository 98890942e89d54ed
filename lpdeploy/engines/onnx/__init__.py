"""A graph of standard ONNX operators, for any runtime; ONNX Runtime runs it here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lpdeploy.engines.engine import Engine

if TYPE_CHECKING:
    from lpdeploy.engines.contract import Contract
    from lpdeploy.engines.runner import Runner
    from lpdeploy.engines.weight_checks import WeightsCheck


def _export(model_folder: Path, output: Path, **options: Any) -> Contract:
    from lpdeploy.engines.onnx.exporter import export_onnx

    return export_onnx(model_folder, output, **options)


def _check_weights(export: Path, model_folder: Path, **options: Any) -> WeightsCheck:
    from lpdeploy.engines.onnx.stored_weights import check_weights

    return check_weights(export, model_folder, **options)


def _load(folder: Path, *, device: str | None = None) -> Runner:
    from lpdeploy.engines.onnx.runner import load_onnx_runner

    return load_onnx_runner(folder, device=device or "cpu")


def find_runtime(device: str) -> object:
    """Import ONNX Runtime with its provider for a device."""
    from lpdeploy.engines.ort_session import import_runtime, split_device

    return import_runtime(split_device(device)[0])


ENGINE = Engine(
    name="onnx",
    summary="a graph of standard ONNX operators, for any runtime",
    load=_load,
    find_library=find_runtime,
    export=_export,
    main_file="model.onnx",
    check_weights=_check_weights,
    precisions=("fp32", "fp16", "bf16"),
    options=("opset", "max_batch", "max_seq_len"),
    hub_card="`onnx/`: a graph of standard ONNX operators; `io.json` lists its inputs and outputs",
)
