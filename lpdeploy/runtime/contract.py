"""What an export says of itself: the JSON beside a graph or an engine, read and checked."""

from pathlib import Path
from typing import Any

from lpdeploy.artifacts import load_json
from lpdeploy.errors import ArtifactError
from lpdeploy.runtime.ort_session import FIX

CONTRACT_VERSION = 1


def load_contract(folder: Path, *, engine: str) -> dict[str, Any]:
    """Read ``io.json`` of an export, and check that its files are whole.

    Raises:
        ArtifactError: A file is missing, cut short, or of another export or engine.
    """
    contract = load_json(folder / "io.json", fix=FIX)
    if not isinstance(contract, dict) or contract.get("engine") != engine:
        raise ArtifactError(f"'{folder / 'io.json'}' describes no export for {engine}. {FIX}")
    version = contract.get("schema_version")
    if version != CONTRACT_VERSION:
        raise ArtifactError(
            f"'{folder / 'io.json'}' has schema version {version!r}; this lpdeploy reads "
            f"{CONTRACT_VERSION}. {FIX}"
        )
    for name, recorded in contract["files"].items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"No {name} in '{folder}'. {FIX}")
        # The size tells a truncated copy at once; hashing gigabytes would double the loading.
        if path.stat().st_size != recorded["bytes"]:
            raise ArtifactError(
                f"'{path}' has {path.stat().st_size} bytes, its export had {recorded['bytes']}. "
                f"Copy it again, or: {FIX}"
            )
    return contract
