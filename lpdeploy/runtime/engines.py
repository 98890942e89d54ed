"""Engines by name, and what opens an export for each."""

from collections.abc import Callable, Mapping
from pathlib import Path

from lpdeploy.runtime.onnx_runner import load_onnx_runner
from lpdeploy.runtime.ort_runner import load_ort_runner
from lpdeploy.runtime.runner import Runner

EXPORTS: Mapping[str, tuple[str, Callable[..., Runner]]] = {
    "onnx": ("io.json", load_onnx_runner),
    "ort": ("io.json", load_ort_runner),
}
"""Engine -> the contract of its exports, and what loads one from a folder onto a ``device``."""

ENGINES = ("torch", *EXPORTS)
"""All that a model runs on; torch runs a checkpoint as it is."""


def load_exported(folder: Path, *, engine: str, device: str = "cpu") -> Runner:
    """Open an export of any engine.

    Raises:
        ArtifactError: A file is missing, damaged or of another engine, or it does not run here.
        MissingDependencyError: The engine is not installed.
    """
    _, load = EXPORTS[engine]
    return load(folder, device=device)
