"""The export stage: which folder of a run or model goes to which engine, and its record."""

import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lpdeploy.artifacts import compute_sha256, record_stage
from lpdeploy.engines.onnx.exporter import export_onnx
from lpdeploy.engines.ort.exporter import export_ort
from lpdeploy.engines.trt.exporter import export_tensorrt
from lpdeploy.errors import LpdeployError
from lpdeploy.models.place import locate_model
from lpdeploy.run_folder import check_output

# Engine -> what exports to it, and the file that stands for the result in the manifest.
_EXPORTERS: dict[str, tuple[Callable[..., dict[str, Any]], str]] = {
    "onnx": (export_onnx, "model.onnx"),
    "ort": (export_ort, "model.onnx"),
    "trt": (export_tensorrt, "model.engine"),
}


def export(
    target: str | os.PathLike[str],
    *,
    engine: str = "onnx",
    output: Path | None = None,
    unmerged: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Export a run's compacted model, or a model folder.

    Args:
        target: Run, model folder or hub name.
        engine: ``onnx``, ``ort`` or ``trt``.
        output: Folder; by default ``ENGINE`` (``ENGINE-unmerged``) in the run or model folder.
        unmerged: Export a run's ``unmerged`` model, with LoRA as separate products.
        options: Of ``export_onnx``, ``export_ort`` or ``export_tensorrt``; None is as if not
            given.

    Returns:
        The contract of the export, and ``output``, ``bytes`` and ``seconds``.

    Raises:
        ArtifactError: The run has no such model, or ``output`` exists.
        LpdeployError: The engine does not know an option.
    """
    options = {name: value for name, value in options.items() if value is not None}
    _check_options(engine, options)
    place = locate_model(target, unmerged=unmerged)
    default = place.get_export(engine)
    folder = output or default
    check_output(folder, default=default, inputs=place.inputs)
    record = {"target": str(target), "engine": engine, "unmerged": unmerged, **options}
    with (
        place.hold(),
        record_stage(place.records, f"export {folder.name}", record) as stage,
    ):
        contract = export_folder(engine, place.folder, folder, adapter=place.adapter, **options)
        stage.inputs = {place.folder.name: contract["source"]["sha256"]}
        stage.outputs = {folder.name: compute_sha256(folder / _EXPORTERS[engine][1])}
    return {
        **contract,
        "output": str(folder),
        "bytes": sum(file.stat().st_size for file in folder.iterdir()),
        "seconds": stage.seconds,
    }


def export_folder(engine: str, model: Path, output: Path, **options: Any) -> dict[str, Any]:
    """Export a checkpoint to an engine, and keep no record of it.

    Args:
        engine: As above.
        model: A Hugging Face folder.
        output: The folder to write.
        options: Of the engine's exporter.

    Returns:
        The contract of the export.
    """
    return _EXPORTERS[engine][0](model, output, **options)


def _check_options(engine: str, options: Mapping[str, object]) -> None:
    unknown = options.keys() - inspect.signature(_EXPORTERS[engine][0]).parameters
    if unknown:
        name = min(unknown)
        raise LpdeployError(f"`{name}` is not an option of `engine={engine}`. Leave it out.")
