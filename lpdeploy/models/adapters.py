"""LoRA on a model through peft: attaching it, reaching its tensors, saving it, expanding it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lpdeploy.errors import ArtifactError, quote_error
from lpdeploy.families.groups import LINEARS, OUTPUT_LINEARS, expand_index
from lpdeploy.folders import check_untouched
from lpdeploy.models.finite import check_finite
from lpdeploy.plan import PruningPlan
from lpdeploy.records import load_record

ADAPTER = "default"
_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
# Fields of an adapter's config that make it more, or other, than ``scaling B A`` of one rank.
_OTHER_KINDS = (
    *("use_dora", "use_rslora", "use_qalora", "use_bdlora", "lora_bias", "bias", "rank_pattern"),
    *("alpha_pattern", "modules_to_save", "fan_in_fan_out", "layer_replication"),
    "target_parameters",
)


@dataclass(frozen=True)
class LoraWeights:
    """The LoRA update of one Linear: ``scaling * lora_b @ lora_a``.

    Attributes:
        lora_a: Shape (rank, in).
        lora_b: Shape (out, rank).
        scaling: ``alpha / rank``.
    """

    lora_a: Tensor
    lora_b: Tensor
    scaling: float


def attach_lora(
    model: Any, *, rank: int, alpha: float, dropout: float, seed: int, init: str = "peft"
) -> Any:
    """Wrap a causal LM in a peft model with LoRA on all seven projections of every layer.

    Args:
        model: The causal LM.
        rank: Of A and B.
        alpha: LoRA adds ``alpha / rank * B A``.
        dropout: On LoRA's input.
        seed: Of the initial weights.
        init: ``peft`` for a random A and B = 0, or ``groups``; see ``init_lora_by_groups``.

    Returns:
        The ``PeftModel``; only LoRA weights (float32) are trainable.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft takes a float too
        lora_dropout=dropout,
        target_modules=list(LINEARS),
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(model, config)
    config.target_modules = sorted(LINEARS)  # peft makes a set of it, saved in any order
    if init == "groups":
        init_lora_by_groups(wrapped)
    return wrapped


def init_lora_by_groups(model: nn.Module) -> None:
    """Start LoRA with A = 0 and a random B in o_proj and down_proj, whose groups are columns.

    peft starts with a random A and B = 0 everywhere, where Eq. 9 estimates the gradient G of a
    weight as ``scaling G A^T A``. This keeps the rows of G apart, but mixes its columns: of the
    columns that belong to a group it says nothing. With A = 0, the estimate is
    ``scaling B B^T G``, which keeps the columns apart. The model computes the same as before, and
    the adapter is one like any other. B is drawn as peft draws A, with out in place of in.

    Args:
        model: A ``PeftModel`` whose LoRA was added as peft does by default, and not trained yet.

    Raises:
        ValueError: It has no adapter ``default`` on these projections, or B is not 0: it was
            trained, or starts in a way that changes the base, such as PiSSA.

    Source:
        Ours. LoRAPrune, arXiv:2305.18403, Algorithm 1, says only that A and B are random. On how
        the two ways to start differ in training: Hayou et al., arXiv:2406.08447.
    """
    outputs: list[Any] = [
        module
        for name, module in model.named_modules()
        if name.endswith(OUTPUT_LINEARS) and ADAPTER in getattr(module, "lora_A", {})
    ]
    if not outputs:
        raise ValueError(
            f"model has no LoRA adapter '{ADAPTER}' on o_proj and down_proj; wrap it by "
            "peft.get_peft_model"
        )
    if any(module.lora_B[ADAPTER].weight.any() for module in outputs):
        raise ValueError(
            "LoRA's B is not 0: the adapter was trained, or starts in another way; add a new one"
        )
    for module in outputs:
        weight_b = module.lora_B[ADAPTER].weight
        bound = weight_b.shape[0] ** -0.5
        nn.init.zeros_(module.lora_A[ADAPTER].weight)
        nn.init.uniform_(weight_b, -bound, bound)


def get_lora_weights(linear: Any) -> LoraWeights:
    """Return the live LoRA tensors of one wrapped Linear."""
    return LoraWeights(
        lora_a=linear.lora_A[ADAPTER].weight,
        lora_b=linear.lora_B[ADAPTER].weight,
        scaling=linear.scaling[ADAPTER],
    )


def get_base_linear(linear: Any) -> nn.Linear:
    """Return the frozen Linear inside a LoRA wrapper, or the Linear itself."""
    return getattr(linear, "base_layer", linear)


def load_adapter(folder: Path) -> dict[str, LoraWeights]:
    """Read a peft adapter as plain tensors.

    Returns:
        Module name in the base model (``model.layers.0.mlp.up_proj``) -> its LoRA weights.

    Raises:
        ArtifactError: The folder holds no readable LoRA adapter, or has changed since lpdeploy
            wrote it.
    """
    check_untouched(folder, fix="Restore the file, or prune again.")
    config = _load_adapter_config(folder)
    try:
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"'{folder}' is no readable LoRA adapter: {quote_error(error)}. Prune again."
        ) from error
    for name, tensor in tensors.items():
        check_finite(tensor, name=name)
        _check_tensor(folder, config, name, tensor)
    names = {name.removesuffix(end) for name in tensors for end in (_A, _B) if name.endswith(end)}
    missing = {name + end for name in names for end in (_A, _B)} ^ tensors.keys()
    if missing:
        raise ArtifactError(f"'{folder}' has no pair for {min(missing):.200}. Prune again.")
    scaling = config.lora_alpha / config.r
    return {
        name.removeprefix(_PREFIX): LoraWeights(tensors[name + _A], tensors[name + _B], scaling)
        for name in sorted(names)
    }


@dataclass(frozen=True)
class _AdapterConfig:
    peft_type: Literal["LORA"]
    r: int
    lora_alpha: float


def _load_adapter_config(folder: Path) -> _AdapterConfig:
    """Read a config without peft, which takes some fields for code to import.

    Refuses an adapter that is more, or other, than ``scaling B A`` of one rank.
    """
    path = folder / "adapter_config.json"
    config = load_record(_AdapterConfig, path, fix="Prune again.")
    every = load_record(dict[str, Any], path, fix="Prune again.")
    if config.r < 1:
        raise ArtifactError(f"'{folder}' has rank {config.r!r}; it must be 1 or more. Prune again.")
    for name in _OTHER_KINDS:
        if every.get(name) not in (None, False, "none", {}, []):
            raise ArtifactError(
                f"'{folder}' has {name}={every[name]!r:.80}, and only plain LoRA is merged. "
                "Prune again."
            )
    return config


def _check_tensor(folder: Path, config: _AdapterConfig, name: str, tensor: Tensor) -> None:
    rank = tensor.shape[0 if name.endswith(_A) else 1] if tensor.ndim == 2 else None
    if rank != config.r:
        raise ArtifactError(
            f"'{folder}' is of rank {config.r} by its config, and {name:.200} of rank {rank}. "
            "Prune again."
        )


def check_adapter(weights: Mapping[str, LoraWeights], plan: PruningPlan) -> None:
    """Check that an adapter has the layers and the widths that a plan leaves.

    Raises:
        ArtifactError: It has not: merged, it would leave layers as they were.
    """
    widths = {
        piece.module: (piece.dim, len(plan.kept[spec.name]) * piece.block)
        for spec in plan.kept_specs
        for piece in spec.slices
    }
    whole = {module for spec in plan.kept_specs for module in spec.whole}
    odd = sorted((widths.keys() | whole) ^ weights.keys())
    if odd:
        raise ArtifactError(
            f"Plan and adapter are of different runs: only one of them has {odd[0]}. Prune again."
        )
    for module, (dim, width) in widths.items():
        lora = weights[module]
        has = lora.lora_a.shape[1] if dim else lora.lora_b.shape[0]
        if has != width:
            raise ArtifactError(
                f"Plan and adapter are of different runs: the plan leaves {width} "
                f"{'columns' if dim else 'rows'} of {module}, the adapter has {has}. Prune again."
            )


def load_unmerged(model: Any, adapter: Path) -> Any:
    """Put a saved adapter on ``model`` without merging it.

    Returns:
        The ``PeftModel``, in eval mode.
    """
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(adapter)).eval()


def apply_lora_weights(model: nn.Module, weights: Mapping[str, LoraWeights]) -> None:
    """Copy LoRA tensors into the wrapped Linears of ``model`` (the base model inside peft)."""
    with torch.no_grad():
        for name, source in weights.items():
            target = get_lora_weights(model.get_submodule(name))
            target.lora_a.copy_(source.lora_a)
            target.lora_b.copy_(source.lora_b)


def expand_lora(weights: Mapping[str, LoraWeights], plan: PruningPlan) -> dict[str, LoraWeights]:
    """Give the adapter of a pruned model the shapes of its base; what was removed is zero.

    Args:
        weights: Adapter of the pruned model.
        plan: What was removed from it.

    Returns:
        Adapter of the base, that computes the same where the removed groups are masked.
    """
    expanded: dict[str, LoraWeights] = {}
    for spec in plan.kept_specs:
        expanded |= {module: weights[module] for module in spec.whole}
        for piece in spec.slices:
            source = weights[piece.module]
            index = expand_index(torch.tensor(plan.kept[spec.name]), piece.block)
            full = spec.num_groups * piece.block
            lora_a, lora_b = source.lora_a, source.lora_b
            if piece.dim == 0:
                lora_b = lora_b.new_zeros(full, lora_b.shape[1]).index_copy(0, index, lora_b)
            else:
                lora_a = lora_a.new_zeros(lora_a.shape[0], full).index_copy(1, index, lora_a)
            expanded[piece.module] = LoraWeights(lora_a, lora_b, source.scaling)
    return expanded
