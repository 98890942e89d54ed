"""Which models a latency benchmark compares: on disk, exported, and described."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpdeploy.benchmark.random_models import save_random_adapter
from lpdeploy.engines import get_engine
from lpdeploy.engines.contract import load_contract
from lpdeploy.engines.export import export_folder
from lpdeploy.engines.exports import find_export
from lpdeploy.engines.runner import Runner
from lpdeploy.models.adapters import load_adapter
from lpdeploy.models.compact import find_base
from lpdeploy.models.find import list_weight_files
from lpdeploy.models.loading import load_config, load_model
from lpdeploy.models.place import ModelPlace, locate_model
from lpdeploy.models.shapes import count_parameters
from lpdeploy.run_folder import RunFolder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Variant:
    """A model on an engine, on disk.

    Attributes:
        model: Folder or hub name, for the table.
        ratio: Share of groups removed.
        engine: Of ``ENGINES``.
        merged: Whether LoRA is merged.
        parameters: Of the model and of its unmerged adapter.
        bytes: Of the weight files that are loaded.
        device: ``cpu`` or ``cuda``.
        folder: The checkpoint.
        adapter: A peft adapter that stays unmerged.
        exported: What the engine opens; None for torch, which opens the checkpoint.
        load: What opens ``exported``, of the engine's record: a process of its own imports it.
        rank: Of the unmerged LoRA; 0 where it is merged.
    """

    model: str
    ratio: float
    engine: str
    merged: bool
    parameters: int
    bytes: int
    device: str
    folder: Path
    adapter: Path | None = None
    exported: Path | None = None
    load: Callable[..., Runner] | None = None
    rank: int = 0


@dataclass(frozen=True)
class TimedModel:
    """A model on disk that is to be timed.

    Attributes:
        name: For the table.
        folder: A Hugging Face folder.
        ratio: Share of groups removed.
        adapter: A peft adapter that stays unmerged.
        place: Where its exports lie; None for a model that has none.
    """

    name: str
    folder: Path
    ratio: float = 0.0
    adapter: Path | None = None
    place: ModelPlace | None = None


def list_variants(
    models: Sequence[str],
    *,
    engines: Sequence[str],
    forms: Sequence[bool],
    device: str,
    scratch: Path,
    base: Path | None = None,
    limits: Mapping[str, int] | None = None,
) -> list[Variant]:
    """List every variant of the models: dense and pruned, merged and unmerged, on each engine.

    A run stands for its pruned model and for its base, the base once for all runs that share it.
    What is not exported yet, or in another precision, is exported to ``scratch``.

    Args:
        models: Runs, model folders or hub names.
        engines: Of ``ENGINES``, with a precision behind a colon where it matters: ``ort:int4``.
        forms: Whether merged (True), unmerged (False) or both are wanted. A model that is no run
            has no adapter and is timed merged only.
        device: ``cpu`` or ``cuda``.
        scratch: Empty folder for exports and for the adapter of an unpruned base.
        base: Where the base model of the runs lies now, if it was moved.
        limits: ``max_batch`` and ``max_seq_len`` of exports that are made here.

    Raises:
        ArtifactError: A run has no compacted, or no unmerged, model.
    """
    checkpoints: dict[tuple[Path, bool], TimedModel] = {}
    for model in models:
        for checkpoint in _list_models(model, moved_to=base, forms=forms, scratch=scratch):
            merged = checkpoint.adapter is None
            checkpoints.setdefault((checkpoint.folder.resolve(), merged), checkpoint)
    return [
        build_variant(checkpoint, engine=engine, device=device, scratch=scratch, limits=limits)
        for engine in engines
        for checkpoint in sorted(
            checkpoints.values(), key=lambda c: (c.ratio, c.adapter is not None)
        )
    ]


def _list_models(
    model: str, *, moved_to: Path | None, forms: Sequence[bool], scratch: Path
) -> list[TimedModel]:
    run = RunFolder(model)
    if not run.is_complete:
        return [_describe_place(locate_model(model))]
    plan = run.load_plan()
    base = find_base(plan, moved_to)
    listed = []
    if True in forms:
        listed.append(TimedModel(plan.base_model, base))
        listed.append(_describe_place(locate_model(run)))
    if False in forms:
        fresh = _save_fresh_adapter(base, like=run.adapter, folder=scratch / "dense-adapter")
        listed.append(TimedModel(plan.base_model, base, adapter=fresh))
        listed.append(_describe_place(locate_model(run, unmerged=True)))
    return listed


def _describe_place(place: ModelPlace) -> TimedModel:
    record = place.load_record()
    name = place.given if place.run is None else str(place.folder)
    ratio = record.ratio if record else 0.0
    return TimedModel(name, place.folder, ratio, place.adapter, place)


def _save_fresh_adapter(base: Path, *, like: Path, folder: Path) -> Path:
    if not folder.is_dir():
        first = next(iter(load_adapter(like).values()))
        rank = first.lora_a.shape[0]
        save_random_adapter(load_model(base), folder, rank=rank, alpha=first.scaling * rank)
    return folder


def build_variant(
    checkpoint: TimedModel,
    *,
    engine: str,
    device: str,
    scratch: Path,
    limits: Mapping[str, int] | None = None,
) -> Variant:
    """Describe a checkpoint on an engine, exporting it to ``scratch`` where that is still to do."""
    engine, _, precision = engine.partition(":")
    exported = None
    record = get_engine(engine)
    if record.export is not None:
        exported = _find_export(checkpoint, engine, precision)
        if exported is None:
            logger.info("exporting %s to %s for the benchmark", checkpoint.name, engine)
            exported = _export(checkpoint, engine, precision, scratch=scratch, limits=limits or {})
    parameters, rank = count_parameters(load_config(checkpoint.folder)), 0
    if checkpoint.adapter is not None:
        weights = load_adapter(checkpoint.adapter).values()
        parameters += sum(w.lora_a.numel() + w.lora_b.numel() for w in weights)
        rank = next(iter(weights)).lora_a.shape[0]
    return Variant(
        model=checkpoint.name,
        ratio=checkpoint.ratio,
        engine=engine,
        merged=checkpoint.adapter is None,
        parameters=parameters,
        bytes=_count_bytes(checkpoint, engine, exported),
        device=device,
        folder=checkpoint.folder,
        adapter=checkpoint.adapter,
        exported=exported,
        load=record.load if exported else None,
        rank=rank,
    )


def _find_export(model: TimedModel, engine: str, precision: str) -> Path | None:
    folder = find_export(model.place, engine) if model.place else None
    if folder is None:
        return None
    stored = load_contract(folder, get_engine(engine)).precision
    return folder if precision in ("", stored) else None


def _export(
    checkpoint: TimedModel,
    engine: str,
    precision: str,
    *,
    scratch: Path,
    limits: Mapping[str, int],
) -> Path:
    folder = scratch / f"{engine}-{len(list(scratch.iterdir()))}"
    options: dict[str, Any] = {**limits, **({"precision": precision} if precision else {})}
    if "max_seq_len" in options:  # more than the model has is refused later, by its own sentence
        positions = load_config(checkpoint.folder).max_position_embeddings
        options["max_seq_len"] = min(options["max_seq_len"], positions)
    export_folder(engine, checkpoint.folder, folder, adapter=checkpoint.adapter, **options)
    return folder


def _count_bytes(checkpoint: TimedModel, engine: str, exported: Path | None) -> int:
    if exported is not None:
        files = load_contract(exported, get_engine(engine)).files
        return sum(file.bytes for file in files.values())
    paths = list_weight_files(checkpoint.folder)
    if checkpoint.adapter is not None:
        paths = [*paths, checkpoint.adapter / "adapter_model.safetensors"]
    return sum(path.stat().st_size for path in paths)
