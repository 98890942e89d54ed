"""The folder that vLLM opens, and with it transformers serve and SGLang: a stock checkpoint."""

import shlex
import shutil
from pathlib import Path

from transformers import PretrainedConfig

from lpdeploy.errors import LpdeployError
from lpdeploy.families.groups import get_head_dim
from lpdeploy.models.checkpoint import carry_files
from lpdeploy.models.find import list_weight_files
from lpdeploy.models.loading import load_config, load_tokenizer
from lpdeploy.models.place import ModelPlace
from lpdeploy.servers.fp8 import save_fp8
from lpdeploy.servers.readme import save_readme
from lpdeploy.servers.sources import has_chat_template, link_or_copy, resolve_length
from lpdeploy.servers.verdicts import Packed, divide_over_ranks, get_server

_RANKS = (1, 2, 4, 8)
# Numbers of a head that its attention is compiled for on a CPU, in version 0.32.
_CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
_INDEX = "model.safetensors.index.json"
_FP8 = "fp8"
_FP8_NOTE = (
    "Its projections are in FP8, with one scale per row, and their inputs are rounded to FP8 token "
    "by token. vLLM computes so on GPUs of compute capability 8.9 and newer."
)


def package_vllm(
    place: ModelPlace,
    folder: Path,
    *,
    output: Path,
    precision: str | None = None,
    tensor_parallel: int = 1,
    max_seq_len: int | None = None,
) -> Packed:
    """Fill a folder with a stock checkpoint and the commands that serve it.

    Args:
        place: The model, a Hugging Face folder whose layers are alike.
        folder: To fill.
        output: Where it will be, for the commands.
        precision: ``fp8`` to round the projections, for vLLM alone; None for the checkpoint as it
            is.
        tensor_parallel: GPUs that share the heads; the shape was checked against it.
        max_seq_len: Longest prompt and answer together; None for the model's positions.

    Returns:
        With the details ``dtype``, ``precision``, ``max_seq_len``, and ``tensor_parallel``: the
        numbers of GPUs up to 8 that heads and channels divide over.

    Raises:
        ArtifactError: There is no tokenizer, or as ``save_fp8``.
        LpdeployError: The model has fewer positions than ``max_seq_len``, or ``precision`` is
            another.
    """
    if precision not in (None, _FP8):
        raise LpdeployError(
            f"`target=vllm` does not write `precision={precision}`. Use `precision=fp8`, or leave "
            "`precision` out for the checkpoint as it is."
        )
    model = place.folder
    config = load_config(model)
    load_tokenizer(model, config)
    length = resolve_length(max_seq_len, positions=config.max_position_embeddings)
    dtype = str(config.dtype or "float32").removeprefix("torch.")
    if precision == _FP8:
        save_fp8(model, folder)
    else:
        _link_checkpoint(model, folder)
    carry_files(model, folder)
    _complete_generation_config(folder, config)
    options = ["--dtype", dtype, "--max-model-len", str(length)]
    options += ["--tensor-parallel-size", str(tensor_parallel)] if tensor_parallel > 1 else []
    command = ["vllm", "serve", str(output), *options]
    ranks = [size for size in _RANKS if divide_over_ranks(config, size) is None]
    notes = [*_list_notes(config), *([_FP8_NOTE] if precision == _FP8 else [])]
    save_readme(
        folder,
        "vllm",
        notes=notes,
        name=output.name,
        path=output,
        command=shlex.join(command),
        options=shlex.join(options),
        dtype=dtype,
        precision=precision,
        length=length,
        ranks=ranks,
        version=get_server("vllm").version,
        architecture=(config.architectures or [""])[0],
        chat=has_chat_template(folder),
    )
    details = {
        "dtype": dtype,
        "precision": precision,
        "max_seq_len": length,
        "tensor_parallel": ranks,
    }
    return Packed(command=shlex.join(command), notes=notes, details=details)


def _link_checkpoint(model: Path, folder: Path) -> None:
    for file in list_weight_files(model):
        link_or_copy(file, folder / file.name)
    for name in ("config.json", _INDEX):
        if (model / name).is_file():
            shutil.copyfile(model / name, folder / name)


def _list_notes(config: PretrainedConfig) -> list[str]:
    head_dim = get_head_dim(config)
    if head_dim in _CPU_HEADS:
        return []
    sizes = ", ".join(map(str, _CPU_HEADS))
    return [f"On a CPU, vLLM does not support a head size of {head_dim}, only {sizes}."]


def _complete_generation_config(folder: Path, config: PretrainedConfig) -> None:
    """Write the tokens that end a text where the checkpoint leaves them to its config."""
    if not (folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        GenerationConfig.from_model_config(config).save_pretrained(folder)
