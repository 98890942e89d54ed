"""What an export says of itself: the JSON beside a graph or an engine, read and checked."""

from pathlib import Path
from typing import Any

from lpdeploy.artifacts import load_json
from lpdeploy.errors import ArtifactError
from lpdeploy.runtime.ort_session import FIX

CONTRACT_VERSION = 1


def load_contract(
    folder: Path, *, engine: str, name: str = "io.json", fix: str = FIX
) -> dict[str, Any]:
    """Read what an export says of itself, and check that its files are whole.

    Args:
        folder: Of the export.
        engine: What the export must be for.
        name: The file that says it.
        fix: What a user does where the export cannot be used.

    Raises:
        ArtifactError: A file is missing, cut short, or of another export or engine.
    """
    contract = load_json(folder / name, fix=fix)
    if not isinstance(contract, dict) or contract.get("engine") != engine:
        raise ArtifactError(f"'{folder / name}' describes no export for {engine}. {fix}")
    version = contract.get("schema_version")
    if version != CONTRACT_VERSION:
        raise ArtifactError(
            f"'{folder / name}' has schema version {version!r}; this lpdeploy reads "
            f"{CONTRACT_VERSION}. {fix}"
        )
    for file, recorded in contract["files"].items():
        path = folder / file
        if not path.is_file():
            raise ArtifactError(f"No {file} in '{folder}'. {fix}")
        # The size tells a truncated copy at once; hashing gigabytes would double the loading.
        if path.stat().st_size != recorded["bytes"]:
            raise ArtifactError(
                f"'{path}' has {path.stat().st_size} bytes, its export had {recorded['bytes']}. "
                f"Copy it again, or: {fix}"
            )
    return contract
