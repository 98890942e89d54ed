"""Prompts from a file."""

from pathlib import Path
from typing import Any

from lpdeploy.data.sources import read_json_rows, read_text
from lpdeploy.errors import DataError

_FIELDS = ("prompt", "instruction", "question", "text")


def load_prompts(path: Path) -> list[str]:
    """Read one prompt from each line, or from each row of a ``.jsonl`` or ``.json`` file.

    Empty lines are left out. A row is a string, or has the prompt in ``prompt``, ``instruction``,
    ``question`` or ``text``.

    Raises:
        DataError: The file cannot be read, holds no prompt, or a row has none.
    """
    if path.suffix.lower() in (".jsonl", ".json"):
        found = [_read_row(row, where) for where, row in read_json_rows(path)]
    else:
        found = [line for line in read_text(path).split("\n") if line.strip()]
    if not found:
        raise DataError(f"'{path}' holds no prompt. Write one in each line.")
    return found


def _read_row(row: Any, where: str) -> str:
    if isinstance(row, str):
        return row
    name = next((n for n in _FIELDS if isinstance(row, dict) and n in row), None)
    if name is None or not isinstance(row[name], str):
        raise DataError(f"{where} has no prompt. Give it a text in one of {', '.join(_FIELDS)}.")
    text: str = row[name]
    return text
