"""The compact stage: from base, plan and adapter to a dense checkpoint that others load."""

import inspect
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig

from lpdeploy.artifacts import check_unchanged, compute_sha256, save_json
from lpdeploy.errors import ArtifactError
from lpdeploy.families import get_family, is_per_layer
from lpdeploy.families.groups import list_group_specs
from lpdeploy.folders import FOLDER_RECORD, atomic_folder, check_replaceable
from lpdeploy.manifest import load_output_hash, load_stage, record_stage
from lpdeploy.models.card import build_model_card
from lpdeploy.models.chat_format import ChatFormat
from lpdeploy.models.checkpoint import (
    carry_files,
    check_weights,
    compute_pruned_layout,
    save_shards,
    stream_pruned_blocks,
)
from lpdeploy.models.find import list_weight_files, resolve_model
from lpdeploy.models.loading import (
    compute_model_sha256,
    find_config,
    load_config,
    load_tokenizer,
)
from lpdeploy.models.record import ModelRecord
from lpdeploy.models.run_weights import RunWeights, load_run_weights
from lpdeploy.models.shapes import (
    build_pruned_config,
    compute_widths,
    count_parameters,
    list_widths,
)
from lpdeploy.plan import HEADS, PruningPlan, rename_layer
from lpdeploy.records import load_record
from lpdeploy.run_folder import ADAPTER, MODEL, RunFolder, check_output

_Found = TypeVar("_Found")


@dataclass(frozen=True)
class CompactResult:
    """What ``compact`` wrote.

    Attributes:
        model: The folder.
        record: Where the model comes from, and its shape.
        seconds: Time of the whole stage.
        peak_bytes: Peak memory of the process.
    """

    model: Path
    record: ModelRecord
    seconds: float
    peak_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return what the command prints with ``--json``."""
        shape = ("architecture", "parameters", "bytes", "heads", "kv_heads", "channels")
        return {
            "model": str(self.model),
            **{name: getattr(self.record, name) for name in shape},
            "seconds": self.seconds,
            "peak_bytes": self.peak_bytes,
        }


def compact(
    run: str | os.PathLike[str],
    *,
    output: Path | None = None,
    base: Path | None = None,
    keep_adapter: bool = False,
    max_shard_bytes: int = 1 << 30,
    overwrite: bool = False,
) -> CompactResult:
    """Write the dense pruned model of a run.

    Args:
        run: The folder that ``prune`` wrote.
        output: The folder to write; ``RUN/model`` by default, or ``RUN/unmerged`` with
            ``keep_adapter``.
        base: Where the base model lies now, if it was moved.
        keep_adapter: Leave LoRA unmerged: write the pruned base, and a stock PEFT adapter in its
            folder ``adapter``.
        max_shard_bytes: Largest size of a weight file.
        overwrite: Replace an earlier result.

    Raises:
        ArtifactError: The run is incomplete, its base or adapter has changed, or the output
            exists or would replace one of them.
        RunInUseError: Another process is writing into the run.
    """
    run = RunFolder(run)
    plan = run.load_plan()
    default = run.get_model(unmerged=keep_adapter)
    output = output or default
    with run.hold():
        base = _locate_base(plan, base)
        check_output(output, default=default, inputs=(base, run.path))
        check_replaceable(output, kind=MODEL, overwrite=overwrite)
        weights = load_run_weights(run, plan)
        options = {"output": str(output), "max_shard_bytes": max_shard_bytes}
        name = "compact --keep-adapter" if keep_adapter else "compact"
        with record_stage(run.path, name, options) as stage:
            with atomic_folder(output, kind=MODEL, overwrite=overwrite) as folder:
                own = replace(weights, lora={}) if keep_adapter else weights
                sha256s = _save_weights(folder, base, plan, own, max_shard_bytes=max_shard_bytes)
                record = _save_rest(
                    folder, run, base, plan, output=output, sha256s=sha256s, merged=not keep_adapter
                )
            stage.inputs = {
                "base": plan.base_sha256,
                run.adapter.name: compute_sha256(run.adapter),
                **({run.refit.name: plan.refit_sha256} if plan.refit_sha256 else {}),
            }
            stage.outputs = {output.name: record.sha256}
    return CompactResult(output, record, stage.seconds, stage.peak_bytes)


def _save_rest(
    folder: Path,
    run: RunFolder,
    base: Path,
    plan: PruningPlan,
    *,
    output: Path,
    sha256s: Mapping[str, str],
    merged: bool,
) -> ModelRecord:
    """Write all but the weights: config, tokenizer, an unmerged adapter, record and card.

    Args:
        folder: Where to.
        run: What is compacted.
        base: The unpruned model.
        plan: What is removed from it.
        output: The folder's name once it is complete.
        sha256s: Hashes of the weight files that were written, by name.
        merged: Whether LoRA is in the weights.
    """
    config = load_config(base)
    pruned = build_pruned_config(config, compute_widths(config, plan.specs, plan.kept))
    widths = list_widths(pruned)
    pruned.save_pretrained(folder)
    _carry_files(base, folder, before=config, after=pruned)
    _apply_chat_format(run, folder, pruned)
    if not merged:
        _copy_adapter(run, folder, plan, base=output)
    record = ModelRecord(
        base_model=plan.base_model,
        base_sha256=plan.base_sha256,
        plan_sha256=compute_sha256(run.plan),
        ratio=plan.ratio,
        achieved=dict(plan.achieved),
        merged=merged,
        architecture=(pruned.architectures or [""])[0],
        parameters={"before": count_parameters(config), "after": count_parameters(pruned)},
        bytes={"before": _measure_weights(base), "after": _measure_weights(folder)},
        heads=[width.heads for width in widths],
        kv_heads=[width.kv_heads for width in widths],
        channels=[width.channels for width in widths],
        sha256=compute_model_sha256(folder, known=sha256s),
    )
    record.save(folder)
    prune = load_stage(run.path, "prune")
    stock = not is_per_layer(pruned.model_type)
    card = build_model_card(
        record, config, output=output, recorded=prune.options if prune else {}, stock=stock
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    return record


def _save_weights(
    folder: Path,
    base: Path,
    plan: PruningPlan,
    weights: RunWeights,
    *,
    max_shard_bytes: int,
) -> dict[str, str]:
    """Write the pruned weights, and check on the way that the base is the one that was pruned.

    Returns:
        File name -> SHA-256 of what was written.
    """
    read: dict[str, str] = {}
    try:
        layout = compute_pruned_layout(base, plan, weights)
        blocks = stream_pruned_blocks(base, plan, weights, hashes=read)
        with _use_one_thread():
            written = save_shards(folder, layout, blocks, max_shard_bytes=max_shard_bytes)
            next(blocks, None)  # the end of the last file
    except ArtifactError:
        _check_base(base, plan)  # that it is another says more than what came of it
        raise
    _check_base(base, plan, known=read)
    return written


@contextmanager
def _use_one_thread() -> Iterator[None]:
    """Leave the other cores to hashing and writing: torch's threads would spin between blocks."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _carry_files(base: Path, folder: Path, *, before: Any, after: Any) -> None:
    """Put beside the weights what else a model needs: tokenizer, settings, classes of its own."""
    carry_files(base, folder)
    if is_per_layer(after.model_type):
        shutil.copy(inspect.getfile(type(after)), folder)
    if get_family(before.model_type) is get_family(after.model_type):
        return
    # transformers chooses a tokenizer's class by the model type beside it, and the two may differ
    # at spaces, as LLaMA's and Mistral's do. Saved as it was loaded, it encodes as the base's does.
    tokenizer = load_tokenizer(base, before)
    if type(tokenizer) is not type(load_tokenizer(folder, after)):
        tokenizer.save_pretrained(folder)


def _apply_chat_format(run: RunFolder, folder: Path, config: PretrainedConfig) -> None:
    """Ship the form in which conversations were written, if the run was tuned on any.

    Raises:
        ArtifactError: Its file is gone, or has changed.
    """
    expected = load_output_hash(run.path, "prune", run.chat.name)
    if expected is None:
        return
    fix = "Restore it, or prune again."
    if not run.chat.is_file():
        raise ArtifactError(f"'{run.chat}' is missing: the run was tuned on conversations. {fix}")
    check_unchanged(run.chat, expected, fix=fix)
    load_record(ChatFormat, run.chat, fix=fix).apply(folder, config)


def find_base(plan: PruningPlan, moved_to: Path | None = None) -> Path:
    """Return the folder of a plan's base model, checked to be the one that was pruned.

    Args:
        plan: It names the base and its hash.
        moved_to: Where the base lies now, if not where the plan says.

    Raises:
        ArtifactError: It is gone, has changed, or has other groups than the plan.
    """
    base = _resolve_base(plan, moved_to)
    _check_base(base, plan)
    _check_groups(base, plan)
    return base


def find_base_config(plan: PruningPlan, moved_to: Path | None = None) -> PretrainedConfig:
    """Return the config of a plan's base model, whose weights need not be there.

    Raises:
        ArtifactError: It is gone, or has other groups than the plan.
    """
    config = _find_base(find_config, plan, moved_to)
    if not _has_groups(config, plan):
        name = moved_to or plan.base_model
        raise ArtifactError(f"plan.json lists other groups than '{name}' has. Prune again.")
    return config


def _resolve_base(plan: PruningPlan, moved_to: Path | None) -> Path:
    return _find_base(resolve_model, plan, moved_to)


def _find_base(find: Callable[[str], _Found], plan: PruningPlan, moved_to: Path | None) -> _Found:
    if moved_to is not None:
        return find(str(moved_to))
    try:
        return find(plan.base_model)
    except ArtifactError as error:
        raise ArtifactError(f"{error} If the base model was moved, give its `base`.") from error


def _locate_base(plan: PruningPlan, moved_to: Path | None) -> Path:
    """Find a plan's base whose weights are checked later, as they are read."""
    base = _resolve_base(plan, moved_to)
    try:
        _check_groups(base, plan)
    except ArtifactError:
        _check_base(base, plan)
        raise
    return base


def _check_base(base: Path, plan: PruningPlan, *, known: Mapping[str, str] | None = None) -> None:
    if compute_model_sha256(base, known=known) != plan.base_sha256:
        raise ArtifactError(
            f"The base model '{base}' is not the one that was pruned: its hash "
            "differs. Restore it, or prune again."
        )


def _check_groups(base: Path, plan: PruningPlan) -> None:
    config = load_config(base)
    check_weights(base, config, plan.specs)
    if not _has_groups(config, plan):
        raise ArtifactError(f"plan.json lists other groups than '{base}' has. Prune again.")


def _has_groups(config: PretrainedConfig, plan: PruningPlan) -> bool:
    return any(list_group_specs(config, heads=heads) == plan.specs for heads in HEADS)


def _copy_adapter(run: RunFolder, folder: Path, plan: PruningPlan, *, base: Path) -> None:
    shutil.copytree(run.adapter, folder / ADAPTER, ignore=shutil.ignore_patterns(FOLDER_RECORD))
    if plan.dropped:  # the pruned base numbers its layers anew
        weights = folder / ADAPTER / "adapter_model.safetensors"
        renamed = {rename_layer(name, plan.layers): t for name, t in load_file(weights).items()}
        save_file({name: t for name, t in renamed.items() if name}, weights, {"format": "pt"})
    path = folder / ADAPTER / "adapter_config.json"
    config = load_record(dict[str, Any], path, fix="Prune again.")
    config["base_model_name_or_path"] = str(base)  # its shapes are those of the pruned base
    save_json(path, config)


def _measure_weights(folder: Path) -> int:
    return sum(file.stat().st_size for file in list_weight_files(folder))
