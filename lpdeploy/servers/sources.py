"""What a package is filled with: files of a checkpoint, exports made of it, and what they say."""

import os
import shutil
from pathlib import Path
from typing import Any

from lpdeploy.errors import LpdeployError
from lpdeploy.folders import FOLDER_RECORD
from lpdeploy.records import load_record

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
    if (folder / "chat_template.jinja").is_file():
        return True
    if not path.is_file():
        return False
    settings = load_record(dict[str, Any], path, fix="Copy the tokenizer anew.")
    return bool(settings.get("chat_template"))
