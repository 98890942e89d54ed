"""What a model runs on: exporters, runners, and the one interface over them."""

from lpdeploy.engines.engine import Engine
from lpdeploy.engines.onnx import ENGINE as ONNX
from lpdeploy.engines.ort import ENGINE as ORT
from lpdeploy.engines.torch import ENGINE as TORCH
from lpdeploy.engines.trt import ENGINE as TRT

ENGINES: dict[str, Engine] = {engine.name: engine for engine in (TORCH, ONNX, ORT, TRT)}
"""All engines by name. Adding one: its record here, or ``ENGINES["name"] = Engine(...)``."""


def get_engine(name: str) -> Engine:
    """Return the record of an engine.

    Raises:
        ValueError: There is no such engine.
    """
    if name not in ENGINES:
        raise ValueError(f"`engine` is {name!r}; it must be one of {', '.join(ENGINES)}")
    return ENGINES[name]


def list_exporting() -> list[Engine]:
    """Return the engines that a model can be exported to."""
    return [engine for engine in ENGINES.values() if engine.export is not None]
