"""The GGUF file that llama.cpp opens, and its command."""

import shlex
from collections.abc import Mapping
from pathlib import Path

from transformers import PretrainedConfig

from lpdeploy.errors import LpdeployError
from lpdeploy.models.loading import PRECISIONS, get_dtype, load_config
from lpdeploy.models.place import ModelPlace
from lpdeploy.servers.gguf_file import count_positions, measure_types, save_gguf
from lpdeploy.servers.gguf_types import K_BLOCK, K_QUANTS, TYPES, list_precisions
from lpdeploy.servers.llama_quantizer import load_quantizer, quantize_gguf
from lpdeploy.servers.readme import save_readme
from lpdeploy.servers.sources import has_chat_template, resolve_length
from lpdeploy.servers.verdicts import Packed


def package_llamacpp(
    place: ModelPlace,
    folder: Path,
    *,
    output: Path,
    precision: str | None = None,
    max_seq_len: int | None = None,
) -> Packed:
    """Fill a folder with a GGUF file and the commands that open it.

    Args:
        place: The model, a Hugging Face folder whose layers are alike.
        folder: To fill.
        output: Where it will be, for the commands and the file's name.
        precision: ``fp32``, ``fp16``, ``bf16``, ``int8`` (Q8_0), or a type by llama.cpp's own
            name, for which its quantizer is needed; None for the checkpoint's.
        max_seq_len: Longest prompt and answer together, in the commands; None for all
            positions.

    Returns:
        With the details ``file``, ``precision``, and ``types``: the share of the weights that is
        in each type of GGUF.

    Raises:
        LpdeployError: The precision is none of those, or as ``save_gguf`` and ``quantize_gguf``.
        MissingDependencyError, ArtifactError: As ``save_gguf`` and ``load_quantizer``.
    """
    model = place.folder
    config = load_config(model)
    stored = PRECISIONS.get(get_dtype(config), "fp32")
    precision = precision or stored
    if precision not in list_precisions():
        raise LpdeployError(
            f"`target=llamacpp` does not write `precision={precision}`. Use "
            f"{', '.join(list_precisions())}."
        )
    length = resolve_length(max_seq_len, positions=count_positions(config))
    kind = TYPES.get(precision, precision).lower()
    file = f"{output.name}-{kind}.gguf"
    if precision in TYPES:
        notes = save_gguf(model, folder / file, name=output.name, precision=precision)
    else:
        notes = _save_quantized(
            model, folder / file, name=output.name, precision=precision, stored=stored
        )
    types = measure_types(folder / file)
    if precision in K_QUANTS:
        notes.append(_describe_types(types, config))
    path = output / file
    command = shlex.join(["llama-server", "-m", str(path), "-c", str(length), "--port", "8080"])
    save_readme(
        folder,
        "llamacpp",
        name=output.name,
        file=path,
        kind=kind,
        command=command,
        length=length,
        notes=notes,
        chat=has_chat_template(model),
        quantized=precision not in TYPES,
    )
    details = {"file": file, "precision": precision, "types": types}
    return Packed(command=command, notes=notes, details=details)


def _save_quantized(
    model: Path, file: Path, *, name: str, precision: str, stored: str
) -> list[str]:
    """Write a file in the precision of the checkpoint, and let llama.cpp quantize that."""
    library = load_quantizer(precision)
    whole = file.with_suffix(".whole.gguf")
    notes = save_gguf(model, whole, name=name, precision=stored)
    quantize_gguf(library, whole, file, precision=precision)
    whole.unlink()
    return notes


def _describe_types(types: Mapping[str, float], config: PretrainedConfig) -> str:
    """Say what the weights are in, and that rows of odd widths are in no K-quant."""
    shares = ", ".join(f"{share:.1%} in {name}" for name, share in types.items())
    text = f"Of the weights in matrices, {shares}."
    other = sum(share for name, share in types.items() if not name.endswith("_K"))
    if not other:
        return text
    text += (
        f" {other:.1%} lie in rows of no multiple of {K_BLOCK}, which no K-quant takes: llama.cpp "
        "gave them types of more bits."
    )
    if config.intermediate_size % K_BLOCK == 0:
        return text
    return f"{text} Prune with `round_to={K_BLOCK}`, and the channels are not among them."
