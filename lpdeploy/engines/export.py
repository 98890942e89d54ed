"""The export stage: which folder of a run or model goes to which engine, and its record."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lpdeploy.artifacts import check_apart, compute_sha256, record_stage
from lpdeploy.engines.onnx.exporter import export_onnx
from lpdeploy.engines.ort.exporter import export_ort
from lpdeploy.engines.trt.exporter import export_tensorrt
from lpdeploy.errors import ArtifactError, LpdeployError
from lpdeploy.models.loading import compute_model_sha256, resolve_model

# Engine -> what exports to it, and the file that stands for the result in the manifest.
_EXPORTERS: dict[str, tuple[Callable[..., dict[str, Any]], str]] = {
    "onnx": (export_onnx, "model.onnx"),
    "ort": (export_ort, "model.onnx"),
    "trt": (export_tensorrt, "model.engine"),
}


def export(
    target: str,
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
    run = Path(target)
    is_run = (run / "plan.json").is_file()
    if unmerged and not is_run:
        raise ArtifactError(f"--unmerged needs a run; '{target}' has no plan.json.")
    model = _find_model(run, unmerged=unmerged) if is_run else resolve_model(target)
    options = {name: value for name, value in options.items() if value is not None}
    _check_options(engine, options)
    folder = output or (run if is_run else model) / (f"{engine}-unmerged" if unmerged else engine)
    check_apart(folder, inputs=(run, model) if is_run else (model,))
    record = {"target": target, "engine": engine, "unmerged": unmerged, **options}
    with record_stage(run if is_run else model, f"export {folder.name}", record) as stage:
        adapter = model / "adapter" if unmerged else None
        contract = export_folder(engine, model, folder, adapter=adapter, **options)
        stage.inputs = {model.name: compute_model_sha256(model)}
        stage.outputs = {folder.name: compute_sha256(folder / _EXPORTERS[engine][1])}
    return {
        **contract,
        "output": str(folder),
        "bytes": sum(file.stat().st_size for file in folder.iterdir()),
        "seconds": stage.seconds,
    }


def _find_model(run: Path, *, unmerged: bool) -> Path:
    folder = run / ("unmerged" if unmerged else "model")
    if not folder.is_dir():
        command = f"lpdeploy compact {run}" + (" --keep-adapter" if unmerged else "")
        raise ArtifactError(f"No {folder.name} in '{run}'. Run '{command}' first.")
    return folder


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
        name = min(unknown).replace("_", "-")
        raise LpdeployError(f"--{name} is no option of --engine {engine}. Leave it out.")
