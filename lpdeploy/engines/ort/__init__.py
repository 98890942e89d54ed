"""A graph of ONNX Runtime's own operators, with an in-place KV cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lpdeploy.engines.engine import Engine, TritonBackend
from lpdeploy.engines.onnx import find_runtime

if TYPE_CHECKING:
    from lpdeploy.engines.contract import Contract
    from lpdeploy.engines.runner import Runner
    from lpdeploy.engines.weight_checks import WeightsCheck


def _export(model_folder: Path, output: Path, **options: Any) -> Contract:
    from lpdeploy.engines.ort.exporter import export_ort

    return export_ort(model_folder, output, **options)


def _check_weights(export: Path, model_folder: Path, **options: Any) -> WeightsCheck:
    from lpdeploy.engines.ort.stored_weights import check_weights

    return check_weights(export, model_folder, **options)


def _apply_packed(export: Path, model: Any, *, round_activations: bool) -> None:
    from lpdeploy.engines.ort.stored_weights import apply_packed

    apply_packed(export, model, round_activations=round_activations)


def _load(folder: Path, *, device: str | None = None) -> Runner:
    from lpdeploy.engines.ort.runner import load_ort_runner

    return load_ort_runner(folder, device=device or "cpu")


ENGINE = Engine(
    name="ort",
    summary="a graph of ONNX Runtime's own operators with an in-place KV cache, the fastest on a "
    "CPU and ready for ONNX Runtime GenAI",
    load=_load,
    find_library=find_runtime,
    export=_export,
    main_file="model.onnx",
    check_weights=_check_weights,
    apply_packed=_apply_packed,
    precisions=("fp32", "fp16", "bf16", "int8", "int4"),
    options=("activations", "block_size", "max_batch", "max_seq_len"),
    # Some inputs have no batch dimension, so Triton must not batch requests.
    triton=TritonBackend("onnxruntime", batches=False, joins=True),
    hub_card="`ort/`: a graph of ONNX Runtime's own operators, ready for ONNX Runtime GenAI",
)
