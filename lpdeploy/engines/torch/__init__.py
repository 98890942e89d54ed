"""torch: runs a checkpoint as it is, with LoRA merged or beside the weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lpdeploy.engines.engine import Engine

if TYPE_CHECKING:
    from lpdeploy.engines.runner import Runner


def _load(folder: Path, *, device: str | None = None) -> Runner:
    from lpdeploy.engines.torch.runner import load_torch_runner

    return load_torch_runner(folder, device=device or "cpu")


ENGINE = Engine(name="torch", summary="the checkpoint itself, in transformers", load=_load)
