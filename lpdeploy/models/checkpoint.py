"""Writing a pruned checkpoint by streaming the base: cut, merge, next block of rows."""

import shutil
from collections.abc import Iterable, Iterator, MutableMapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig

from lpdeploy.artifacts import save_json
from lpdeploy.errors import ArtifactError
from lpdeploy.families.groups import expand_index
from lpdeploy.models.find import list_weight_files
from lpdeploy.models.finite import check_finite, round_weight
from lpdeploy.models.run_weights import RunWeights
from lpdeploy.models.tensor_files import (
    TensorInfo,
    iterate_blocks,
    load_layout,
    write_tensors,
)
from lpdeploy.models.weight_files import index_weights
from lpdeploy.plan import GroupSpec, PruningPlan, Slice, rename_layer
from lpdeploy.run_folder import ADAPTER

_OVERFLOW = "Save the base model in bfloat16, and prune that."
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


def carry_files(source: Path, output: Path) -> None:
    """Copy tokenizer and generation config, byte for byte."""
    for name in CARRIED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, output / name)


Layout = dict[str, TensorInfo]


def check_weights(base: Path, config: PretrainedConfig, specs: Iterable[GroupSpec]) -> None:
    """Check that a base can be compacted: that each weight of its groups is there, once, by name.

    Only the headers of its files are read.

    Raises:
        ArtifactError: A weight is missing, held by two files or of a type that is not read, or a
            file is damaged.
    """
    stored = index_weights(base, config)
    modules = {name for spec in specs for name in (*(p.module for p in spec.slices), *spec.whole)}
    missing = {f"{module}.weight" for module in modules} - stored.keys()
    if missing:
        raise ArtifactError(
            f"'{base}' lacks {len(missing)} weights by the names of its class, first "
            f"{min(missing)}. Load it with transformers, and save it again with save_pretrained."
        )


def compute_pruned_layout(base: Path, plan: PruningPlan, weights: RunWeights) -> Layout:
    """Say which tensors the pruned model has, in the order in which the base holds them.

    Args:
        base: Folder of the unpruned model.
        plan: What stays.
        weights: Of the run; without LoRA to leave the base unmerged.

    Raises:
        ArtifactError: A weight of the plan is missing, its file damaged, or the adapter of a
            weight does not fit it.
    """
    cuts = _index_cuts(plan)
    layout: Layout = {}
    for file in list_weight_files(base):
        for name, info in load_layout(file).items():
            new = None if _is_table(name) else rename_layer(name, plan.layers)
            if new is not None:
                module, _, leaf = name.rpartition(".")
                layout[new] = _cut_info(info, cuts.get(module), leaf=leaf)
                if leaf == "weight":
                    _check_fit(layout[new], weights, module)
    wanted = (rename_layer(f"{module}.weight", plan.layers) for module in cuts)
    missing = {name for name in wanted if name} - layout.keys()
    if missing:
        raise ArtifactError(
            f"'{base}' lacks {len(missing)} weights of its plan, first {min(missing)}. "
            "Give the complete base model."
        )
    return layout


def stream_pruned_blocks(
    base: Path,
    plan: PruningPlan,
    weights: RunWeights,
    *,
    hashes: MutableMapping[str, str],
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the pruned model in blocks of rows, in the base's dtype.

    Args:
        base: Folder of the unpruned model.
        plan: What stays.
        weights: Of the run; without LoRA to leave the base unmerged.
        hashes: Gets the SHA-256 of each file of the base, under its name, when it was read.

    Yields:
        (name in the pruned model, rows): cut to the plan, refitted, and merged,
        ``W + scaling B A`` in float32.

    Raises:
        ArtifactError: A file is missing or damaged, or a weight holds NaN or infinity.
        LpdeployError: A merged weight is too large for the base's precision.
    """
    cuts = _index_cuts(plan)
    for file in list_weight_files(base):
        for name, first, block in iterate_blocks(file, hashes=hashes):
            new = None if _is_table(name) else rename_layer(name, plan.layers)
            if new is None:
                continue
            module, _, leaf = name.rpartition(".")
            check_finite(block, name=name)
            start, rows = _cut_rows(block, first, cuts.get(module), leaf=leaf)
            if leaf == "weight":
                rows = _change(rows, weights, module, start=start)
            if rows is block:  # of a buffer that blocks which are left out overwrite, too
                rows = rows.clone()
            if rows.numel():
                yield new, rows


def _is_table(name: str) -> bool:
    # Old LLaMA checkpoints store this table; transformers computes it.
    return name.endswith("rotary_emb.inv_freq")


_Cut = tuple[Slice, Tensor]


def _index_cuts(plan: PruningPlan) -> dict[str, _Cut]:
    """Map each module to its slice and the rows or columns of it that stay."""
    return {
        piece.module: (piece, expand_index(torch.tensor(plan.kept[spec.name]), piece.block))
        for spec in plan.kept_specs
        for piece in spec.slices
    }


def _is_whole(cut: _Cut | None, leaf: str) -> bool:
    # A bias belongs to the rows; columns leave it alone.
    return cut is None or (leaf == "bias" and cut[0].dim == 1)


def _cut_info(info: TensorInfo, cut: _Cut | None, *, leaf: str) -> TensorInfo:
    if cut is None or _is_whole(cut, leaf):
        return info
    piece, index = cut
    shape = list(info.shape)
    shape[piece.dim] = len(index)
    return replace(info, shape=tuple(shape))


def _cut_rows(block: Tensor, first: int, cut: _Cut | None, *, leaf: str) -> tuple[int, Tensor]:
    """Return what stays of rows ``first`` and after, and its first row in the pruned tensor."""
    if cut is None or _is_whole(cut, leaf):
        return first, block
    piece, index = cut
    if piece.dim == 1:
        return first, block.index_select(1, index)
    start, stop = torch.searchsorted(index, torch.tensor([first, first + len(block)])).tolist()
    return start, block.index_select(0, index[start:stop] - first)


def _check_fit(info: TensorInfo, weights: RunWeights, module: str) -> None:
    lora, refit = weights.lora.get(module), weights.refit.get(module)
    shapes: dict[str, tuple[int, ...]] = {}
    if lora is not None:
        shapes[ADAPTER] = (lora.lora_b.shape[0], lora.lora_a.shape[1])
    if refit is not None:
        shapes["refit"] = tuple(refit.shape)
    for what, shape in shapes.items():
        if shape != info.shape:
            raise ArtifactError(
                f"The {what} of {module}.weight has shape {shape[0]} x {shape[1]}, its pruned "
                f"weight {info.shape}. Plan and {what} are of different runs."
            )


def _change(rows: Tensor, weights: RunWeights, module: str, *, start: int) -> Tensor:
    """Return rows of a weight as the run left them, in the precision that they had."""
    lora, refit = weights.lora.get(module), weights.refit.get(module)
    if lora is None and refit is None:
        return rows
    stop = start + len(rows)
    source = (rows if refit is None else refit[start:stop]).float()
    if lora is not None:
        factor = lora.lora_b[start:stop].float()
        source = torch.addmm(source, factor, lora.lora_a.float(), alpha=lora.scaling)
    what = "refitted" if lora is None else "merged"
    name = f"The {what} {module}.weight"
    return round_weight(source, rows.dtype, name=name, fix=_OVERFLOW)


def save_shards(
    folder: Path, layout: Layout, blocks: Iterator[tuple[str, Tensor]], *, max_shard_bytes: int
) -> dict[str, str]:
    """Write safetensors files of bounded size, with an index where there are many.

    Args:
        folder: Where to.
        layout: All tensors, in the order in which their blocks come.
        blocks: (name, rows).
        max_shard_bytes: Bytes of tensors a file; one that is larger gets its own.

    Returns:
        File name -> its SHA-256.
    """
    shards = _split_layout(layout, max_shard_bytes)
    hashes: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        single = len(shards) == 1
        file = f"model{'' if single else f'-{number:05d}-of-{len(shards):05d}'}.safetensors"
        hashes[file] = write_tensors(folder / file, shard, blocks)
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(info.num_bytes for info in layout.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        save_json(folder / "model.safetensors.index.json", index)
    return hashes


def _split_layout(layout: Layout, max_shard_bytes: int) -> list[Layout]:
    shards: list[Layout] = [{}]
    size = 0
    for name, info in layout.items():
        # Readers map numbers in place, so each begins at a multiple of its size.
        if shards[-1] and (size + info.num_bytes > max_shard_bytes or size % info.item_bytes):
            shards.append({})
            size = 0
        shards[-1][name] = info
        size += info.num_bytes
    return shards
