"""Saving a run in the middle, and going on from there: adapters, moments and scores only.

One safetensors file, renamed into place, so that there is always a whole one. The base model is
not in it: it is loaded and cut again.
"""

import errno
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lpdeploy.artifacts import atomic_file
from lpdeploy.config import PruneConfig, rename_fields
from lpdeploy.errors import ArtifactError
from lpdeploy.machine import list_versions
from lpdeploy.models.loading import resolve_device
from lpdeploy.pruning.state import PruningState
from lpdeploy.run_folder import RunFolder

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
# Where these differ, a run goes on, but sums are rounded in another order.
_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# What may differ between the run that wrote a checkpoint and the one that goes on from it.
# The learning rate is among them because lowering it is the way on after a loss became NaN.
_FREE_OPTIONS = (
    "checkpoint_every",
    "device",
    "gradient_checkpointing",
    "ignore_memory",
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
    run: RunFolder, *, step: int, training: Any, options: PruneConfig, inputs: Mapping[str, str]
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
        "schema_version": SCHEMA_VERSION,
        "lpdeploy": list_versions()["lpdeploy"],
        "step": step,
        "inputs": dict(inputs),
        "options": options.to_json(),
        "environment": _describe_environment(options),
    }
    with atomic_file(run.checkpoint, durable=True) as temporary:
        plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        save_file(plain, temporary, metadata={k: json.dumps(v) for k, v in metadata.items()})


def check_resumable(run: RunFolder) -> None:
    """Check that there is a checkpoint.

    Raises:
        ArtifactError: There is none.
    """
    if not (run.checkpoint).is_file():
        how = "with `overwrite=True`" if run.recipe.exists() else "without `resume=True`"
        raise ArtifactError(
            f"Nothing to resume: '{run}' holds no checkpoint. Run {how} to start anew."
        )


def load_checkpoint(
    run: RunFolder,
    *,
    options: PruneConfig,
    inputs: Mapping[str, str],
    names: Mapping[str, str],
) -> Checkpoint:
    """Read a checkpoint and check that it belongs to this base, data and options.

    Args:
        run: The run folder.
        options: With which it is to go on.
        inputs: Hashes of the base model and the data.
        names: What the user calls them.

    Raises:
        ArtifactError: There is none, it is damaged or of another version, or something differs
            (all that does is named).
    """
    check_resumable(run)
    metadata, tensors = _read(run.checkpoint)
    differences = [
        *_compare_inputs(metadata["inputs"], inputs, old=_load_names(run), new=names),
        *_compare_options(rename_fields(metadata["options"]), options.to_json()),
    ]
    if differences:
        raise ArtifactError(
            f"The checkpoint in '{run}' is of another run: {'; '.join(differences)}. Use the same, "
            "or `overwrite=True` to start anew."
        )
    _warn_of_environment(metadata["environment"], options)
    return Checkpoint(step=metadata["step"], inputs=inputs, tensors=tensors)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = _parse_metadata(file.metadata())
            _check_version(path, metadata)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise ArtifactError(
            f"'{path}' is damaged ({error}). Run with `overwrite=True` to start anew."
        ) from error
    return metadata, tensors


def _compare_inputs(
    saved: Mapping[str, str],
    given: Mapping[str, str],
    *,
    old: Mapping[str, str],
    new: Mapping[str, str],
) -> list[str]:
    return [
        f"{name} was {_name_input(old.get(name), saved[name])} and is "
        f"{_name_input(new.get(name), sha256)} now"
        for name, sha256 in given.items()
        if saved[name] != sha256
    ]


def _compare_options(saved: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} was {saved.get(name)!r} and is {value!r} now"
        for name, value in given.items()
        if name not in _FREE_OPTIONS and saved.get(name) != value
    ]


def _parse_metadata(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    return {name: json.loads(value) for name, value in (metadata or {}).items()}


def _check_version(path: Path, metadata: Mapping[str, Any]) -> None:
    version = metadata.get("schema_version")
    if version != SCHEMA_VERSION:
        writer = f" (lpdeploy {metadata['lpdeploy']})" if "lpdeploy" in metadata else ""
        raise ArtifactError(
            f"'{path}' has schema version {version!r}, and this lpdeploy reads {SCHEMA_VERSION}. "
            f"Go on with the version that wrote it{writer}, or use `overwrite=True` to start anew."
        )


def _load_names(run: RunFolder) -> dict[str, str]:
    """Return what base and data were called when the run began, as far as its recipe says it."""
    try:
        recipe = yaml.safe_load((run.recipe).read_text(encoding="utf-8"))["prune"]
        return {"base": recipe["model"], "data": recipe["data"]}
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return {}


def _name_input(name: str | None, sha256: str) -> str:
    return f"{'another' if name is None else repr(name)} (sha256 {sha256[:12]})"


def _describe_environment(options: PruneConfig) -> dict[str, Any]:
    device = resolve_device(options.device)
    versions = list_versions()
    found = {name: versions.get(name) for name in _LIBRARIES}
    return {**found, "device": device, "threads": torch.get_num_threads()}


def _warn_of_environment(saved: Mapping[str, Any], options: PruneConfig) -> None:
    changes = [
        f"{name} was {saved.get(name)} and is {value}"
        for name, value in _describe_environment(options).items()
        if saved.get(name) != value
    ]
    if changes:
        logger.warning(
            "Going on where other software or hardware left off (%s): the result will be as good, "
            "but not the same to the bit.",
            "; ".join(changes),
        )


@contextmanager
def explain_full_disk(run: RunFolder) -> Iterator[None]:
    """Turn a write that found no room into one sentence that says what is left of the run.

    Raises:
        ArtifactError: That.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _find_full(error)
        if number is None:
            raise
        raise ArtifactError(
            f"The disk of '{run}' takes no more ({os.strerror(number)}). {_describe_rest(run)}"
        ) from error


def _find_full(error: Exception) -> int | None:
    """Return the system's number for a disk without room, where that was the cause."""
    for number in _FULL:
        # safetensors' errors carry the system's only in their text.
        if getattr(error, "errno", None) == number or f"(os error {number})" in str(error):
            return number
    return None


def _describe_rest(run: RunFolder) -> str:
    try:
        with safe_open(run.checkpoint, framework="pt") as file:
            step = _parse_metadata(file.metadata())["step"]
    except (OSError, SafetensorError):
        return "There is no checkpoint yet: make room, then start anew with `overwrite=True`."
    return f"The checkpoint of step {step} is whole: make room, then go on with `resume=True`."


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
