"""Which models a latency benchmark compares, loaded and ready."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lpdeploy.errors import ArtifactError
from lpdeploy.export.onnx import export_onnx
from lpdeploy.models.adapters import attach_lora, get_lora_weights, load_adapter
from lpdeploy.models.compact import find_base, load_record
from lpdeploy.models.groups import list_group_specs
from lpdeploy.models.loading import (
    list_weight_files,
    load_config,
    load_model,
    resolve_model,
)
from lpdeploy.models.shapes import count_parameters
from lpdeploy.plan import load_plan
from lpdeploy.runtime.onnx_runner import load_onnx_runner
from lpdeploy.runtime.runner import Runner
from lpdeploy.runtime.torch_runner import load_torch_runner

ENGINES = ("torch", "onnx")


@dataclass(frozen=True)
class Variant:
    """A model on an engine.

    Attributes:
        model: Folder or hub name, for the table.
        ratio: Share of groups removed.
        engine: ``torch`` or ``onnx``.
        merged: Whether LoRA is merged.
        parameters: Of the model and of its unmerged adapter.
        bytes: Of their weight files.
        device: Where its inputs go.
        runner: What runs it.
    """

    model: str
    ratio: float
    engine: str
    merged: bool
    parameters: int
    bytes: int
    device: str
    runner: Runner


@dataclass(frozen=True)
class _Checkpoint:
    """A model on disk that is to be timed, with its export where there is one."""

    name: str
    folder: Path
    ratio: float
    adapter: Path | None
    exported: Path | None


def load_variants(
    targets: Sequence[str],
    *,
    engines: Sequence[str],
    forms: Sequence[bool],
    device: str,
    scratch: Path,
    log: Callable[[str], None] = lambda _: None,
) -> list[Variant]:
    """Load every variant of the targets: dense and pruned, merged and unmerged, on each engine.

    A run stands for its pruned model and for its base, the base once for all runs that share it.
    Graphs that are not exported yet are exported to ``scratch``.

    Args:
        targets: Runs, model folders or hub names.
        engines: ``torch``, ``onnx``.
        forms: Whether merged (True), unmerged (False) or both are wanted. A model that is no run
            has no adapter and is timed merged only.
        device: ``cpu`` or ``cuda``.
        scratch: Empty folder for exports and for the adapter of an unpruned base.
        log: Is told what takes time.

    Raises:
        ArtifactError: A run has no compacted, or no unmerged, model.
    """
    checkpoints: dict[tuple[Path, bool], _Checkpoint] = {}
    for target in targets:
        for checkpoint in _list_checkpoints(target, forms=forms, scratch=scratch):
            merged = checkpoint.adapter is None
            checkpoints.setdefault((checkpoint.folder.resolve(), merged), checkpoint)
    return [
        _load(checkpoint, engine=engine, device=device, scratch=scratch, log=log)
        for engine in engines
        for checkpoint in sorted(
            checkpoints.values(), key=lambda c: (c.ratio, c.adapter is not None)
        )
    ]


def _list_checkpoints(target: str, *, forms: Sequence[bool], scratch: Path) -> list[_Checkpoint]:
    run = Path(target)
    if not (run / "plan.json").is_file():
        folder = resolve_model(target)
        ratio = load_record(folder).get("ratio", 0.0)
        return [_Checkpoint(target, folder, ratio, None, _existing(folder / "onnx"))]
    plan = load_plan(run)
    base = find_base(plan)
    listed = []
    if True in forms:
        listed.append(_Checkpoint(plan.base_model, base, 0.0, None, None))
        model = _require(run / "model", f"lpdeploy compact {run}")
        listed.append(_Checkpoint(str(model), model, plan.ratio, None, _existing(run / "onnx")))
    if False in forms:
        fresh = _save_fresh_adapter(base, like=run / "adapter", folder=scratch / "dense-adapter")
        listed.append(_Checkpoint(plan.base_model, base, 0.0, fresh, None))
        model = _require(run / "unmerged", f"lpdeploy compact {run} --keep-adapter")
        exported = _existing(run / "onnx-unmerged")
        listed.append(_Checkpoint(str(model), model, plan.ratio, model / "adapter", exported))
    return listed


def _existing(folder: Path) -> Path | None:
    return folder if folder.is_dir() else None


def _require(folder: Path, command: str) -> Path:
    if not folder.is_dir():
        raise ArtifactError(f"No '{folder}' to time. Run '{command}' first.")
    return folder


def _save_fresh_adapter(base: Path, *, like: Path, folder: Path) -> Path:
    """Save a random adapter for the unpruned base: its values cost the same as trained ones."""
    if not folder.is_dir():
        first = next(iter(load_adapter(like).values()))
        rank = first.lora_a.shape[0]
        model = load_model(base)
        wrapped = attach_lora(model, rank=rank, alpha=first.scaling * rank, dropout=0.0, seed=0)
        with torch.no_grad():
            for spec in list_group_specs(model.config):
                for piece in spec.slices:
                    get_lora_weights(model.get_submodule(piece.module)).lora_b.normal_(std=0.01)
        wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def _load(
    checkpoint: _Checkpoint,
    *,
    engine: str,
    device: str,
    scratch: Path,
    log: Callable[[str], None],
) -> Variant:
    files = list_weight_files(checkpoint.folder)
    parameters = count_parameters(load_config(checkpoint.folder))
    if checkpoint.adapter is not None:
        files = [*files, checkpoint.adapter / "adapter_model.safetensors"]
        weights = load_adapter(checkpoint.adapter).values()
        parameters += sum(w.lora_a.numel() + w.lora_b.numel() for w in weights)
    return Variant(
        model=checkpoint.name,
        ratio=checkpoint.ratio,
        engine=engine,
        merged=checkpoint.adapter is None,
        parameters=parameters,
        bytes=sum(file.stat().st_size for file in files),
        device=device,
        runner=_load_runner(checkpoint, engine=engine, device=device, scratch=scratch, log=log),
    )


def _load_runner(
    checkpoint: _Checkpoint,
    *,
    engine: str,
    device: str,
    scratch: Path,
    log: Callable[[str], None],
) -> Runner:
    if engine == "torch":
        return load_torch_runner(checkpoint.folder, device=device, adapter=checkpoint.adapter)
    folder = checkpoint.exported
    if folder is None:
        folder = scratch / f"onnx-{len(list(scratch.iterdir()))}"
        log(f"exporting {checkpoint.name} to ONNX for the benchmark")
        export_onnx(checkpoint.folder, folder, adapter=checkpoint.adapter)
    return load_onnx_runner(folder, device=device)
