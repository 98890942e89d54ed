"""Writing a pruned checkpoint by streaming the base: cut, merge, next tensor."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lpdeploy.errors import ArtifactError
from lpdeploy.models.adapters import LoraWeights
from lpdeploy.models.groups import expand_index
from lpdeploy.models.loading import list_weight_files
from lpdeploy.plan import PruningPlan, Slice

CARRIED_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)


def carry_files(source: Path, target: Path) -> None:
    """Copy tokenizer and generation config, byte for byte."""
    for name in CARRIED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def stream_pruned_tensors(
    base: Path, plan: PruningPlan, lora: Mapping[str, LoraWeights]
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the pruned model, one at a time, in the base's dtype.

    Args:
        base: Folder of the unpruned model.
        plan: What stays.
        lora: Adapter of the pruned model by module name; empty to leave the base unmerged.

    Yields:
        (name, tensor): cut to the plan and merged, ``W + scaling B A`` in float32.

    Raises:
        ArtifactError: A weight of the plan is missing, damaged, or does not fit its adapter.
    """
    cuts = _index_cuts(plan)
    missing = {f"{module}.weight" for module in cuts}
    for file in list_weight_files(base):
        for name, tensor in _stream_file(file):
            module, _, leaf = name.rpartition(".")
            missing.discard(name)
            cut = _cut_tensor(tensor, *cuts[module], leaf=leaf) if module in cuts else tensor
            if leaf == "weight" and module in lora:
                cut = _merge(cut, lora[module], name=name)
            yield name, cut
    if missing:
        raise ArtifactError(
            f"'{base}' lacks {len(missing)} weights of its plan, first {min(missing)}. "
            "Give the complete base model."
        )


def _index_cuts(plan: PruningPlan) -> dict[str, tuple[Slice, Tensor]]:
    """Map each module to its slice and the rows or columns of it that stay."""
    return {
        piece.module: (piece, expand_index(torch.tensor(plan.kept[spec.name]), piece.block))
        for spec in plan.specs
        for piece in spec.slices
    }


def _stream_file(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                # Old LLaMA checkpoints store this table; transformers computes it.
                if not name.endswith("rotary_emb.inv_freq"):
                    yield name, tensors.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"'{file}' cannot be read: {error}. Copy the base model anew."
        ) from error


def _cut_tensor(tensor: Tensor, piece: Slice, index: Tensor, *, leaf: str) -> Tensor:
    if leaf == "bias" and piece.dim == 1:
        return tensor  # a bias belongs to the rows; columns leave it alone
    return tensor.index_select(piece.dim, index)


def _merge(weight: Tensor, lora: LoraWeights, *, name: str) -> Tensor:
    if lora.lora_b.shape[0] != weight.shape[0] or lora.lora_a.shape[1] != weight.shape[1]:
        raise ArtifactError(
            f"The adapter of {name} has shape {lora.lora_b.shape[0]} x {lora.lora_a.shape[1]}, "
            f"its pruned weight {tuple(weight.shape)}. Plan and adapter are of different runs."
        )
    merged = torch.addmm(
        weight.float(), lora.lora_b.float(), lora.lora_a.float(), alpha=lora.scaling
    )
    return merged.to(weight.dtype)


def save_shards(
    folder: Path, tensors: Iterator[tuple[str, Tensor]], *, max_shard_bytes: int
) -> None:
    """Write tensors as safetensors in shards of bounded size, with an index where there are many.

    Only one shard, and the first tensor of the next, are in memory at a time.
    """
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    written = pending_bytes = 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if pending and pending_bytes + size > max_shard_bytes:
            shards.append(_save_shard(folder, pending, number=len(shards) + 1))
            pending, pending_bytes = {}, 0
        pending[name] = tensor.contiguous()
        pending_bytes += size
        written += size
    shards.append(_save_shard(folder, pending, number=len(shards) + 1))
    _name_shards(folder, shards, total_size=written)


def _save_shard(folder: Path, tensors: dict[str, Tensor], *, number: int) -> list[str]:
    save_file(tensors, folder / f"shard-{number}", metadata={"format": "pt"})
    return list(tensors)


def _name_shards(folder: Path, shards: list[list[str]], *, total_size: int) -> None:
    """Give shards the names that transformers looks for, now that their number is known."""
    if len(shards) == 1:
        (folder / "shard-1").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
