"""The folder that ONNX Runtime GenAI opens: an `ort` export, and the lines that run it."""

import shlex
from pathlib import Path
from typing import Any

from lpdeploy.engines import ORT
from lpdeploy.engines.contract import Contract, load_contract
from lpdeploy.engines.export import export_folder
from lpdeploy.engines.exporting import resolve_max_seq_len
from lpdeploy.engines.exports import find_export
from lpdeploy.models.loading import load_config, load_tokenizer
from lpdeploy.models.place import ModelPlace
from lpdeploy.servers.readme import render, save_readme
from lpdeploy.servers.sources import has_chat_template, take_export
from lpdeploy.servers.tokenizers import list_notes
from lpdeploy.servers.verdicts import Packed

_SCRIPT = "generate.py"


def package_genai(
    place: ModelPlace,
    folder: Path,
    *,
    output: Path,
    precision: str = "fp32",
    activations: str | None = None,
    block_size: int | None = None,
    max_seq_len: int | None = None,
) -> Packed:
    """Fill a folder with a graph for ONNX Runtime GenAI and the lines that run it.

    An ``ort`` export that ``lpdeploy export`` left is taken where it is of this very checkpoint, in
    the same precision and of the same length; otherwise a new one is made.

    Args:
        place: The model, a Hugging Face folder.
        folder: To fill.
        output: Where it will be, for the commands.
        precision: As of ``export_ort``.
        activations: As of ``export_ort``.
        block_size: As of ``export_ort``; None for 32.
        max_seq_len: Longest prompt and answer together; None for 2048, or the model's positions.

    Returns:
        With the details ``precision``, ``max_seq_len``, and ``reused``: the export that was taken,
        or None.

    Raises:
        ArtifactError: There is no tokenizer.
        LpdeployError: The export cannot be made.
    """
    model = place.folder
    config = load_config(model)
    tokenizer = load_tokenizer(model, config)
    length = resolve_max_seq_len(max_seq_len, config)
    found = find_export(place, ORT.name)
    quantized = precision in ("int8", "int4")
    wanted = {
        "precision": precision,
        "block_size": (block_size or 32) if quantized else None,
        "max_seq_len": length,
        "activations": activations or ("fp32" if quantized else precision),
    }
    if found and _describe_export(load_contract(found, ORT)) == wanted:
        take_export(found, folder)
    else:
        found = None
        given = {"activations": activations, "block_size": block_size}
        given = {name: value for name, value in given.items() if value is not None}
        _export_into(model, folder, precision=precision, max_seq_len=length, **given)
    notes = list_notes(tokenizer, server="ONNX Runtime GenAI")
    chat = has_chat_template(model)
    prompt = "Who are you?" if chat else "once upon a time"
    values = {"name": output.name, "path": output, "precision": precision, "length": length}
    values |= {"chat": chat, "prompt": prompt}
    (folder / _SCRIPT).write_text(render(f"{_SCRIPT}.j2", **values), encoding="utf-8")
    command = shlex.join(["python", str(output / _SCRIPT), prompt])
    save_readme(folder, "genai", command=command, notes=notes, **values)
    reused = str(found) if found else None
    details = {"precision": precision, "max_seq_len": length, "reused": reused}
    return Packed(command=command, notes=notes, details=details)


def _describe_export(contract: Contract) -> dict[str, Any]:
    """Return what of an export is chosen by options; its cache is in the type of activations."""
    names = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
    return {
        "precision": contract.precision,
        "block_size": contract.packing.block_size if contract.packing else None,
        "max_seq_len": contract.max_seq_len,
        "activations": names[contract.caches[0].dtype],
    }


def _export_into(model: Path, folder: Path, **options: Any) -> None:
    """Export to a folder of its own, as exports are written, and move its files up."""
    exported = folder / ORT.name
    export_folder(ORT.name, model, exported, **options)
    for file in exported.iterdir():
        file.rename(folder / file.name)
    exported.rmdir()
