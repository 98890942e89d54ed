"""Engines by name, and what opens an export for each."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lpdeploy.artifacts import load_json
from lpdeploy.engines.onnx.runner import load_onnx_runner
from lpdeploy.engines.ort.runner import load_ort_runner
from lpdeploy.engines.ort_session import import_runtime
from lpdeploy.engines.runner import Runner
from lpdeploy.engines.trt.library import load_library
from lpdeploy.engines.trt.runner import CONTRACT, load_trt_runner
from lpdeploy.errors import LpdeployError

EXPORTS: Mapping[str, tuple[str, Callable[..., Runner]]] = {
    "onnx": ("io.json", load_onnx_runner),
    "ort": ("io.json", load_ort_runner),
    "trt": (CONTRACT, load_trt_runner),
}
"""Engine -> the contract of its exports, and what loads one from a folder onto a ``device``."""

ENGINES = ("torch", *EXPORTS)
"""All that a model runs on; torch runs a checkpoint as it is."""


def check_engine(engine: str, *, device: str) -> None:
    """Check that an engine can run here, before any work is done for it.

    Args:
        engine: Of ``ENGINES``.
        device: ``cpu`` or ``cuda``, as resolved.

    Raises:
        MissingDependencyError: Its library is not installed.
        LpdeployError: It runs on a GPU alone.
    """
    if engine == "trt":
        if not device.startswith("cuda"):
            raise LpdeployError(
                "--engine trt runs on an NVIDIA GPU, and torch finds none here (or --device says "
                "cpu). Use --engine ort, or run it where there is one."
            )
        load_library()
    elif engine != "torch":
        import_runtime(device)


def describe_exported(folder: Path, *, engine: str) -> dict[str, Any]:
    """Return what an export says of itself, without opening it.

    Raises:
        ArtifactError: It says nothing that can be read.
    """
    return load_json(folder / EXPORTS[engine][0], fix="Export again.")


def load_exported(folder: Path, *, engine: str, device: str | None = None) -> Runner:
    """Open an export of any engine.

    Args:
        folder: Of the export.
        engine: Of ``EXPORTS``.
        device: ``cpu``, ``cuda`` or ``cuda:1``; None for where the engine runs everywhere: a GPU
            for ``trt``, the CPU for others.

    Raises:
        ArtifactError: A file is missing, damaged or of another engine, or it does not run here.
        MissingDependencyError: The engine is not installed.
    """
    _, load = EXPORTS[engine]
    return load(folder) if device is None else load(folder, device=device)
