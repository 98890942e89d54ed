"""lpdeploy: prune a LLaMA-family model while it fine-tunes with LoRA, and ship it dense."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lpdeploy.api import Run, compare, prune
    from lpdeploy.config import PruneConfig
    from lpdeploy.environment import trust_remote_code
    from lpdeploy.models.adapters import init_lora_by_groups
    from lpdeploy.pruning.callback import PruneCallback
    from lpdeploy.pruning.pruner import LoRAPruner

__version__ = "0.1.0"

__all__ = [
    "LoRAPruner",
    "PruneCallback",
    "PruneConfig",
    "Run",
    "compare",
    "init_lora_by_groups",
    "prune",
    "trust_remote_code",
]

# Imported when they are first used, so that `import lpdeploy` loads no torch.
_HOMES = {
    "LoRAPruner": "lpdeploy.pruning.pruner",
    "PruneCallback": "lpdeploy.pruning.callback",
    "PruneConfig": "lpdeploy.config",
    "Run": "lpdeploy.api",
    "compare": "lpdeploy.api",
    "init_lora_by_groups": "lpdeploy.models.adapters",
    "trust_remote_code": "lpdeploy.environment",
    "prune": "lpdeploy.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lpdeploy' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
