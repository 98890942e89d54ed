"""What a package is filled with: files of a checkpoint, exports made of it, and what they say."""

import os
import shutil
from pathlib import Path

from lpdeploy.artifacts import FOLDER_RECORD, compute_sha256, load_json
from lpdeploy.engines import get_engine
from lpdeploy.engines.contract import Contract, load_contract
from lpdeploy.engines.exports import find_export
from lpdeploy.errors import LpdeployError
from lpdeploy.models.place import ModelPlace

_GRAPHS = (".onnx", ".data", ".engine")


def link_or_copy(source: Path, target: Path) -> None:
    """Put weights into a package, as a second name of the same bytes where the disk can do that.

    They then take no room and no time, and unlike a symbolic link the name is good inside a
    container that sees this folder alone. lpdeploy replaces files and never writes into them; what
    people edit is copied instead, since it would change on both sides.
    """
    try:
        os.link(source.resolve(), target)
    except OSError:  # another disk, a file system without links, or a file of another user
        shutil.copyfile(source, target)


def find_whole_export(place: ModelPlace, engine: str) -> tuple[Path, Contract] | None:
    """Find what ``lpdeploy export`` made of a model, if every file of it is as it was written.

    Returns:
        The folder and its contract; None if there is none, or a file of it has changed.

    Raises:
        ArtifactError: It was made of another model.
    """
    folder = find_export(place, engine)
    if folder is None:
        return None
    contract = load_contract(folder, get_engine(engine))
    for name, recorded in contract.files.items():
        path = folder / name
        if not path.is_file() or compute_sha256(path) != recorded.sha256:
            return None
    return folder, contract


def take_export(source: Path, folder: Path) -> None:
    """Put the files of an export into a folder: weights are linked, what people edit is copied."""
    for file in sorted(source.iterdir()):
        if not file.is_file() or file.name == FOLDER_RECORD:
            continue
        put = link_or_copy if file.suffix in _GRAPHS else shutil.copyfile
        put(file, folder / file.name)


def resolve_length(max_seq_len: int | None, *, positions: int) -> int:
    """Return the longest prompt and answer together: all positions, or fewer.

    Raises:
        LpdeployError: The model has fewer positions.
    """
    if max_seq_len is not None and not 2 <= max_seq_len <= positions:
        raise LpdeployError(
            f"`max_seq_len` {max_seq_len} does not fit a model of {positions} positions. "
            f"Use 2 to {positions}."
        )
    return max_seq_len or positions


def has_chat_template(folder: Path) -> bool:
    """Tell whether a tokenizer knows turns of a chat; without, servers complete text only."""
    path = folder / "tokenizer_config.json"
    settings = load_json(path, fix="Copy the tokenizer anew.") if path.is_file() else {}
    return (folder / "chat_template.jinja").is_file() or bool(settings.get("chat_template"))
