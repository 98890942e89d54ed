"""The GGUF file that llama.cpp opens, and its command."""

import shlex
from pathlib import Path

from lpdeploy.errors import LpdeployError
from lpdeploy.models.loading import PRECISIONS, get_dtype, load_config
from lpdeploy.models.place import ModelPlace
from lpdeploy.servers.gguf_file import TYPES, count_positions, save_gguf
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
        precision: ``fp32``, ``fp16``, ``bf16`` or ``int8`` (Q8_0); None for the checkpoint's.
        max_seq_len: Longest prompt and answer together, in the commands; None for all
            positions.

    Returns:
        With the details ``file`` and ``precision``.

    Raises:
        LpdeployError: The precision is none of those, or as ``save_gguf``.
        MissingDependencyError, ArtifactError: As ``save_gguf``.
    """
    model = place.folder
    config = load_config(model)
    precision = precision or PRECISIONS.get(get_dtype(config), "fp32")
    if precision not in TYPES:
        raise LpdeployError(
            f"`target=llamacpp` does not write `precision={precision}`. Use "
            f"{', '.join(TYPES)}; llama.cpp's own llama-quantize makes smaller ones of fp16."
        )
    length = resolve_length(max_seq_len, positions=count_positions(config))
    kind = TYPES[precision].lower()
    file = f"{output.name}-{kind}.gguf"
    notes = save_gguf(model, folder / file, name=output.name, precision=precision)
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
    )
    return Packed(command=command, notes=notes, details={"file": file, "precision": precision})
