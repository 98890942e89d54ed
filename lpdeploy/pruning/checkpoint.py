"""Saving a run in the middle, and going on from there: adapters, moments, scores, and refits.

One safetensors file, renamed into place, so that there is always a whole one. The base model is
not in it: it is loaded and cut again.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lpdeploy.artifacts import atomic_file, compute_sha256, explain_full_disk
from lpdeploy.config import PruneConfig
from lpdeploy.errors import ArtifactError, DiskFullError, RecipeError, quote_error
from lpdeploy.fields import rename_fields
from lpdeploy.machine import list_versions
from lpdeploy.models.loading import resolve_device
from lpdeploy.pruning.state import PruningState
from lpdeploy.recipe import load_sections
from lpdeploy.records import parse_json, read_record
from lpdeploy.run_folder import RunFolder

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
_MOMENTS = ("exp_avg", "exp_avg_sq")
# Where these differ, a run goes on, but sums are rounded in another order.
_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")

# What may differ between the run that wrote a checkpoint and the one that goes on from it.
# The learning rate is among them because lowering it is the way on after a loss became NaN.
_FREE_OPTIONS = (
    "checkpoint_every",
    "device",
    "eval_every",
    "eval_samples",
    "gradient_checkpointing",
    "ignore_memory",
    "lr",
    "max_grad_norm",
    "max_loss_increase",
    "micro_batch_size",
    "offload_gradients",
    "shard",
)


@dataclass(frozen=True, kw_only=True)
class _Metadata:
    """The header of the file, each field as JSON, beside the hash of all that it holds."""

    step: int
    inputs: dict[str, str]
    options: dict[str, Any]
    environment: dict[str, Any]
    lpdeploy: str
    log_sha256: str | None = None
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class Checkpoint:
    """A run in the middle.

    Attributes:
        step: Optimizer steps done.
        inputs: Hashes of the base model and the data.
        log_sha256: Hash of the log of the steps done; None if there was none.
        tensors: ``lora.*``, ``moments.*``, ``kept.*``, ``average.*``, ``last_seen.*``, and
            ``refit.*``, the weights that were refitted.
    """

    step: int
    inputs: Mapping[str, str]
    log_sha256: str | None
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
    plain = {name: t.detach().cpu().contiguous() for name, t in _list_tensors(training).items()}
    metadata = _Metadata(
        step=step,
        inputs=dict(inputs),
        options=options.to_json(),
        environment=_describe_environment(options),
        lpdeploy=list_versions()["lpdeploy"],
        log_sha256=compute_sha256(run.log) if run.log.is_file() else None,
    )
    written = {name: json.dumps(value) for name, value in asdict(metadata).items()}
    written["sha256"] = json.dumps(_hash(plain, written))
    with atomic_file(run.checkpoint, durable=True) as temporary:
        save_file(plain, temporary, metadata=written)


def capture_checkpoint(training: Any, step: int) -> Checkpoint:
    """Copy the state of a training in memory, as a checkpoint would hold it."""
    tensors = {name: t.detach().cpu().clone() for name, t in _list_tensors(training).items()}
    return Checkpoint(step, {}, None, tensors)


def _list_tensors(training: Any) -> dict[str, Tensor]:
    state: PruningState = training.state
    tensors: dict[str, Tensor] = {}
    for name, parameter in _named_trainable(state.model).items():
        tensors[f"lora.{name}"] = parameter
        for key, value in training.optimizer.state[parameter].items():
            tensors[f"moments.{name}.{key}"] = value
    for kind, values in (*_list_scores(state).items(), ("refit", state.list_refit())):
        tensors |= {f"{kind}.{name}": value for name, value in values.items()}
    return tensors


def _check_hash(written: dict[str, str], tensors: Mapping[str, Tensor]) -> None:
    sha256 = written.pop("sha256", None)  # which earlier versions did not write
    if sha256 is not None and parse_json(sha256) != _hash(tensors, written):
        raise ValueError("its contents are not those that were written")


def _hash(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
        *_compare_inputs(metadata.inputs, inputs, old=_load_names(run), new=names),
        *_compare_options(rename_fields(metadata.options), options.to_json()),
    ]
    if differences:
        raise ArtifactError(
            f"The checkpoint in '{run}' is of another run: {'; '.join(differences)}. Use the same, "
            "or `overwrite=True` to start anew."
        )
    _warn_of_environment(metadata.environment, options)
    return Checkpoint(metadata.step, inputs, metadata.log_sha256, tensors)


def _read(path: Path) -> tuple[_Metadata, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            written = dict(file.metadata() or {})
            metadata = _parse_metadata(path, written)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        _check_hash(written, tensors)
    except (OSError, SafetensorError, ValueError) as error:
        raise ArtifactError(
            f"'{path}' is damaged ({quote_error(error)}). Run with `overwrite=True` to start anew."
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
    saved = {"lora_init": "peft", **saved}  # which a checkpoint from before that option has
    return [
        f"{name} was {saved.get(name)!r} and is {value!r} now"
        for name, value in given.items()
        if name not in _FREE_OPTIONS and saved.get(name) != value
    ]


def _parse_metadata(path: Path, written: Mapping[str, str]) -> _Metadata:
    data = {name: parse_json(value) for name, value in written.items()}
    version = data.get("schema_version")
    if version != SCHEMA_VERSION:
        writer = f" (lpdeploy {data['lpdeploy']})" if "lpdeploy" in data else ""
        raise ArtifactError(
            f"'{path}' has schema version {version!r}, and this lpdeploy reads {SCHEMA_VERSION}. "
            f"Go on with the version that wrote it{writer}, or use `overwrite=True` to start anew."
        )
    return read_record(_Metadata, data)


def _load_names(run: RunFolder) -> dict[str, str]:
    """Return what base and data were called when the run began, as far as its recipe says it."""
    try:
        options = load_sections(run.recipe)["prune"]
        return {"base": str(options["model"]), "data": str(options["data"])}
    except (RecipeError, KeyError):
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
def explain_unfinished(run: RunFolder) -> Iterator[None]:
    """Say what is left of a run that cannot go on because the disk is full.

    Raises:
        DiskFullError: That.
    """
    try:
        with explain_full_disk(run.path):
            yield
    except DiskFullError as error:
        raise DiskFullError(
            f"There is no space left to write '{run}'. {_describe_rest(run)}"
        ) from error


def _describe_rest(run: RunFolder) -> str:
    try:
        with safe_open(run.checkpoint, framework="pt") as file:
            step = _parse_metadata(run.checkpoint, file.metadata() or {}).step
    except (OSError, SafetensorError, ValueError, ArtifactError):
        return "There is no checkpoint yet: make room, then start anew with `overwrite=True`."
    return f"The checkpoint of step {step} is whole: make room, then go on with `resume=True`."


def apply_checkpoint(checkpoint: Checkpoint, training: Any) -> None:
    """Copy LoRA factors, moments and scores into a training whose model is cut already.

    Raises:
        ArtifactError: The checkpoint is of a run with other steps or another LoRA.
    """
    _check_fits(checkpoint, training)
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
    state.restore_refit(checkpoint.select("refit"))


def _check_fits(checkpoint: Checkpoint, training: Any) -> None:
    fix = "Use `overwrite=True` to start anew."
    if not 0 <= checkpoint.step <= training.steps:
        raise ArtifactError(
            f"The checkpoint is of step {checkpoint.step}, and the run has {training.steps}. {fix}"
        )
    expected: dict[str, torch.Size] = {}
    for name, parameter in _named_trainable(training.state.model).items():
        expected[f"lora.{name}"] = parameter.shape
        if checkpoint.step:  # AdamW keeps nothing before its first step
            expected |= {f"moments.{name}.{key}": parameter.shape for key in _MOMENTS}
            expected[f"moments.{name}.step"] = torch.Size([])
    for name, shape in expected.items():
        found = checkpoint.tensors.get(name)
        if found is None or found.shape != shape:
            has = "nothing" if found is None else f"shape {list(found.shape)}"
            raise ArtifactError(
                f"The checkpoint has {has} for {name}, and the run needs shape {list(shape)}. {fix}"
            )


def _named_trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _list_scores(state: PruningState) -> dict[str, dict[str, Tensor]]:
    return {"kept": state.kept, "average": state.average, "last_seen": state.last_seen}
