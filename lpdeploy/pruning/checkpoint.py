"""Saving a run in the middle, and going on from there: adapters, moments and scores only.

One safetensors file, renamed into place, so that there is always a whole one. The base model is
not in it: it is loaded and cut again.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lpdeploy.artifacts import atomic_file
from lpdeploy.errors import ArtifactError
from lpdeploy.pruning.options import PruneOptions
from lpdeploy.pruning.state import PruningState

CHECKPOINT = Path("checkpoint") / "state.safetensors"

# What may differ between the run that wrote a checkpoint and the one that goes on from it.
# The learning rate is among them because lowering it is the way on after a loss became NaN.
_FREE_OPTIONS = (
    "checkpoint_every",
    "device",
    "gradient_checkpointing",
    "lr",
    "max_grad_norm",
    "micro_batch_size",
    "offload_gradients",
    "shard",
)


@dataclass(frozen=True)
class Checkpoint:
    """A run in the middle.

    Attributes:
        step: Optimizer steps done.
        inputs: Hashes of the base model and the data.
        tensors: ``lora.*``, ``moments.*``, ``kept.*``, ``average.*`` and ``last_seen.*``.
    """

    step: int
    inputs: Mapping[str, str]
    tensors: Mapping[str, Tensor]

    def select(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose names start with ``prefix.``, without it."""
        return {
            name.removeprefix(f"{prefix}."): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(f"{prefix}.")
        }


def save_checkpoint(
    run: Path, *, step: int, training: Any, options: PruneOptions, inputs: Mapping[str, str]
) -> None:
    """Write ``run/checkpoint/state.safetensors``, whole or not at all."""
    state: PruningState = training.state
    tensors: dict[str, Tensor] = {}
    for name, parameter in _named_trainable(state.model).items():
        tensors[f"lora.{name}"] = parameter
        for key, value in training.optimizer.state[parameter].items():
            tensors[f"moments.{name}.{key}"] = value
    for kind, values in _list_scores(state).items():
        tensors |= {f"{kind}.{name}": value for name, value in values.items()}
    metadata = {
        "step": json.dumps(step),
        "inputs": json.dumps(dict(inputs)),
        "options": json.dumps(dataclasses.asdict(options)),
    }
    with atomic_file(run / CHECKPOINT) as temporary:
        plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        save_file(plain, temporary, metadata=metadata)


def load_checkpoint(run: Path, *, options: PruneOptions, inputs: Mapping[str, str]) -> Checkpoint:
    """Read a checkpoint and check that it belongs to this base, data and options.

    Raises:
        ArtifactError: There is none, it is damaged, or something differs (named).
    """
    path = run / CHECKPOINT
    if not path.is_file():
        raise ArtifactError(
            f"Nothing to resume: '{run}' holds no checkpoint. Run without --resume to start anew."
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"'{path}' is damaged ({error}). Run with --overwrite to start anew."
        ) from error
    _check_same("input", json.loads(metadata["inputs"]), inputs)
    _check_same("option", json.loads(metadata["options"]), dataclasses.asdict(options))
    return Checkpoint(step=json.loads(metadata["step"]), inputs=inputs, tensors=tensors)


def _check_same(what: str, saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if name not in _FREE_OPTIONS and saved.get(name) != value:
            raise ArtifactError(
                f"The checkpoint was made with another {what}: {name} was {saved.get(name)!r} "
                f"and is {value!r} now. Use the same, or --overwrite to start anew."
            )


def apply_checkpoint(checkpoint: Checkpoint, training: Any) -> None:
    """Copy LoRA factors, moments and scores into a training whose model is cut already."""
    state: PruningState = training.state
    saved = checkpoint.select("lora")
    moments = checkpoint.select("moments")
    with torch.no_grad():
        for name, parameter in _named_trainable(state.model).items():
            parameter.copy_(saved[name])
            own = {k.rsplit(".", 1)[1]: v for k, v in moments.items() if k.startswith(f"{name}.")}
            # AdamW counts its steps in a CPU tensor; the moments live beside the parameter.
            training.optimizer.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device)
                for key, value in own.items()
            }
            device = parameter.device
    state.average = {n: t.to(device) for n, t in checkpoint.select("average").items()}
    state.last_seen = checkpoint.select("last_seen")


def _named_trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _list_scores(state: PruningState) -> dict[str, dict[str, Tensor]]:
    return {"kept": state.kept, "average": state.average, "last_seen": state.last_seen}
