"""Exports of a model: where one lies, and whether it was made of the model that is there now."""

from pathlib import Path
from typing import Any

from lpdeploy.engines.contract import compute_adapter_sha256
from lpdeploy.engines.registry import EXPORTS, describe_exported
from lpdeploy.errors import ArtifactError
from lpdeploy.models.place import ModelPlace


def find_export(place: ModelPlace, engine: str) -> Path | None:
    """Find the export of a model where ``lpdeploy export`` leaves it; None if there is none.

    Raises:
        ArtifactError: It was made of another model, or of another adapter.
    """
    folder = place.get_export(engine)
    if not (folder / EXPORTS[engine][0]).is_file():
        return None
    check_fresh(describe_exported(folder, engine=engine), folder, place, engine)
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
            f"Run '{write_export_command(place, engine)}' first."
        )
    return folder


def check_fresh(contract: Any, folder: Path, place: ModelPlace, engine: str) -> None:
    """Refuse an export of other weights than the model has now.

    Args:
        contract: What the export says of itself.
        folder: Where it lies.
        place: The model.
        engine: Which engine it is for.

    Raises:
        ArtifactError: It is stale; names the command that makes it anew.
    """
    made_from = (contract["source"]["sha256"], contract["source"]["adapter_sha256"])
    adapter = None if place.adapter is None else compute_adapter_sha256(place.adapter)
    if made_from != (place.compute_sha256(), adapter):
        raise ArtifactError(
            f"'{folder}' was exported from another model than '{place.folder}' is now. "
            f"Run '{write_export_command(place, engine)} --overwrite' first."
        )


def write_export_command(place: ModelPlace, engine: str) -> str:
    """Return the command that exports a model."""
    target = place.run or place.given
    return f"lpdeploy export {target} --engine {engine}" + (" --unmerged" if place.unmerged else "")
