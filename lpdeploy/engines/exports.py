"""Exports of a model: where one lies, and whether it was made of the model that is there now."""

from pathlib import Path

from lpdeploy.engines import get_engine
from lpdeploy.engines.contract import load_contract
from lpdeploy.engines.exporting import compute_adapter_sha256
from lpdeploy.engines.runner import Runner
from lpdeploy.errors import ArtifactError
from lpdeploy.folders import check_untouched
from lpdeploy.models.place import ModelPlace


def find_export(place: ModelPlace, engine: str) -> Path | None:
    """Find the export of a model where ``lpdeploy export`` leaves it; None if there is none.

    Raises:
        ArtifactError: It was made of another model or of another adapter. The sentence names the
            command that makes it anew.
    """
    folder, record = place.get_export(engine), get_engine(engine)
    if not (folder / record.contract_file).is_file():
        return None
    source = load_contract(folder, record).source
    adapter = None if place.adapter is None else compute_adapter_sha256(place.adapter)
    if (source.sha256, source.adapter_sha256) != (place.compute_sha256(), adapter):
        raise ArtifactError(
            f"'{folder}' was exported from another model than '{place.folder}' is now. "
            f"Run '{_write_command(place, engine)} --overwrite' first."
        )
    fix = f"Run '{_write_command(place, engine)} --overwrite', or restore the file."
    check_untouched(folder, fix=fix)
    return folder


def need_export(place: ModelPlace, engine: str) -> Path:
    """Find the export of a model.

    Raises:
        ArtifactError: There is none, or it was made of another model.
    """
    folder = find_export(place, engine)
    if folder is None:
        raise ArtifactError(
            f"'{place.given}' has no export for {engine}. "
            f"Run '{_write_command(place, engine)}' first."
        )
    return folder


def load_place(place: ModelPlace, engine: str, *, device: str | None = None) -> Runner:
    """Open a model on an engine: its checkpoint, or its export.

    Args:
        place: The model.
        engine: Name of the engine.
        device: ``cpu``, ``cuda`` or ``cuda:1``; None for the engine's default.

    Raises:
        ArtifactError: There is no such export, it was made of another model, or the model is a base
            whose adapter would be left out.
    """
    made = place.load_record()
    if made is not None and not made.merged and not place.unmerged:
        raise ArtifactError(
            f"'{place.folder}' is a pruned base, whose adapter would be left out. Compact the run "
            "without `keep_adapter`, and give the run."
        )
    record = get_engine(engine)
    folder = place.folder if record.export is None else need_export(place, engine)
    return record.load(folder, device=device)


def _write_command(place: ModelPlace, engine: str) -> str:
    model = place.run or place.given
    return f"lpdeploy export {model} --engine {engine}" + (" --unmerged" if place.unmerged else "")
