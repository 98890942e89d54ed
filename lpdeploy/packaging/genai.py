"""The folder that ONNX Runtime GenAI opens: an `ort` export, and the lines that run it."""

import shlex
from pathlib import Path
from typing import Any

from lpdeploy.export.contract import resolve_max_seq_len
from lpdeploy.export.stage import export_folder
from lpdeploy.models.loading import load_config, load_tokenizer
from lpdeploy.packaging.readme import render, save_readme
from lpdeploy.packaging.sources import find_export, link_or_copy

_SCRIPT = "generate.py"


def package_genai(
    model: Path,
    folder: Path,
    *,
    output: Path,
    precision: str = "fp32",
    max_seq_len: int | None = None,
) -> dict[str, Any]:
    """Fill a folder with a graph for ONNX Runtime GenAI and the lines that run it.

    An ``ort`` export that ``lpdeploy export`` left is taken where it is of this very checkpoint, of
    this precision and length; otherwise a new one is made.

    Args:
        model: A Hugging Face folder.
        folder: To fill.
        output: Where it will be, for the commands.
        precision: ``fp32``, ``fp16``, ``bf16``, or ``int8`` or ``int4`` weights.
        max_seq_len: Longest prompt and answer together; None for 2048, or the model's positions.

    Returns:
        ``command``, ``precision``, ``max_seq_len``, and ``reused``: the export that was taken, or
        None.

    Raises:
        ArtifactError: There is no tokenizer.
        LpdeployError: The export cannot be made.
    """
    config = load_config(model)
    load_tokenizer(model, config)
    length = resolve_max_seq_len(max_seq_len, config)
    found = find_export(model, "ort")
    if found and (found[1]["precision"], found[1]["max_seq_len"]) == (precision, length):
        for file in sorted(found[0].iterdir()):
            link_or_copy(file, folder / file.name)
    else:
        found = None
        _export_into(model, folder, precision=precision, max_seq_len=length)
    values = {"name": output.name, "path": output, "precision": precision, "length": length}
    (folder / _SCRIPT).write_text(render(f"{_SCRIPT}.j2", **values), encoding="utf-8")
    command = shlex.join(["python", str(output / _SCRIPT), "once upon a time"])
    save_readme(folder, "genai", command=command, **values)
    return {
        "command": command,
        "precision": precision,
        "max_seq_len": length,
        "reused": str(found[0]) if found else None,
    }


def _export_into(model: Path, folder: Path, **options: Any) -> None:
    """Export to a folder of its own, as exports are written, and move its files up."""
    exported = folder / "ort"
    export_folder("ort", model, exported, **options)
    for file in exported.iterdir():
        file.rename(folder / file.name)
    exported.rmdir()
