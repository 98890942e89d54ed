"""What the tables of the documents share: Markdown, and where a measurement is from."""

from collections.abc import Iterable, Sequence
from typing import Any


def write_table(header: Sequence[str], rows: Iterable[Sequence[object]], *notes: str) -> str:
    """Write a Markdown table, and below it a paragraph of notes, one per line."""
    first, *others = (f"| {' | '.join(map(str, cells))} |" for cells in (header, *rows))
    below = ["", *notes] if notes else []
    return "\n".join([first, "|---" * len(header) + "|", *others, *below])


def describe(data: dict[str, Any], library: str = "onnxruntime") -> str:
    """Describe the machine, the versions, the date and the command of a measurement."""
    machine = data["machine"]
    versions = ", ".join(
        f"{name} {machine['versions'][name]}" for name in ("torch", "transformers", library)
    )
    # A script that starts others does not load torch, which sets the threads.
    threads = machine["threads"]
    workers = f"{machine['cores']} cores" if threads is None else f"{threads} threads"
    return (
        f"{machine['gpu'] or machine['cpu']}, {workers}, {versions}, "
        f"{machine['date'][:10]}: `{find_command(data)}`"
    )


def find_command(data: dict[str, Any]) -> str:
    """Return the recorded command, which older files have outside of the machine."""
    return data.get("command") or data["machine"]["command"]
