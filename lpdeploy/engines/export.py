"""The export stage: which folder of a run or model goes to which engine, and its record."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpdeploy.artifacts import compute_sha256
from lpdeploy.engines import ENGINES, get_engine
from lpdeploy.engines.contract import Contract
from lpdeploy.manifest import record_stage
from lpdeploy.models.place import locate_model
from lpdeploy.run_folder import check_output


@dataclass(frozen=True)
class ExportResult:
    """What an export is, and what it took.

    Attributes:
        contract: What the export says of itself.
        output: Its folder.
        bytes: Size of everything in the folder.
        seconds: How long the export took.
    """

    contract: Contract
    output: Path
    bytes: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the contract's keys, with ``output``, ``bytes`` and ``seconds`` beside them."""
        own = {"output": str(self.output), "bytes": self.bytes, "seconds": self.seconds}
        return {**self.contract.to_json(), **own}


def export(
    model: str | os.PathLike[str],
    *,
    engine: str = "onnx",
    output: Path | None = None,
    unmerged: bool = False,
    overwrite: bool = False,
    **options: Any,
) -> ExportResult:
    """Export a run's compacted model, or a model folder.

    Args:
        model: Run, model folder or hub name.
        engine: Name of the engine.
        output: Folder; by default ``ENGINE`` (``ENGINE-unmerged``) in the run or model folder.
        unmerged: Export a run's ``unmerged`` model, with LoRA as separate products.
        overwrite: Replace the export that is there.
        options: ``precision`` and the other options of the engine's exporter; None is as if not
            given.

    Raises:
        ArtifactError: The run has no such model, or ``output`` exists.
        LpdeployError: The engine does not know an option.
        ValueError: There is no such engine, or nothing is exported for it.
    """
    options = {name: value for name, value in options.items() if value is not None}
    place = locate_model(model, unmerged=unmerged)
    default = place.get_export(engine)
    folder = output or default
    check_output(folder, default=default, inputs=place.inputs)
    record = {"model": str(model), "engine": engine, "unmerged": unmerged, **options}
    # A model that is no run of ours is left as it is: the record lies in the export then.
    records = folder if place.run is None else place.records
    with (
        place.hold(),
        record_stage(records, f"export {folder.name}", record) as stage,
    ):
        contract = export_folder(
            engine, place.folder, folder, adapter=place.adapter, overwrite=overwrite, **options
        )
        stage.inputs = {place.folder.name: contract.source.sha256}
        stage.outputs = {folder.name: compute_sha256(folder / ENGINES[engine].main_file)}
    size = sum(file.stat().st_size for file in folder.iterdir())
    return ExportResult(contract, folder, size, stage.seconds)


def export_folder(
    engine: str,
    model: Path,
    output: Path,
    *,
    adapter: Path | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Contract:
    """Export a checkpoint to an engine, and keep no record of it.

    Args:
        engine: Name of the engine.
        model: A Hugging Face folder.
        output: The folder to write.
        adapter: A peft adapter that stays beside the weights.
        overwrite: Replace what is at ``output``.
        options: ``precision`` and the other options of the engine's exporter.

    Raises:
        LpdeployError: The engine does not know an option.
        ValueError: There is no such engine, or nothing is exported for it.
    """
    record = get_engine(engine)
    if record.export is None:
        raise ValueError(
            f"engine {engine} runs checkpoints as they are; nothing is exported for it"
        )
    record.check_options(options)
    return record.export(model, output, adapter=adapter, overwrite=overwrite, **options)
