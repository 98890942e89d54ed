"""The groups of a decoder: what must be removed together, in every family alike."""

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from lpdeploy.families import get_family
from lpdeploy.plan import GroupSpec, Slice

ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN_LINEARS = ("gate_proj", "up_proj", "down_proj")
LINEARS = ATTENTION_LINEARS + FFN_LINEARS
OUTPUT_LINEARS = ("o_proj", "down_proj")
"""Those that write into the residual stream: a group is columns of one of them."""


def get_head_dim(config: PretrainedConfig) -> int:
    """Return ``head_dim``, which some configs do not state until heads are removed."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def build_rotary_embedding(config: PretrainedConfig) -> Any:
    """Build transformers' module of rotary positions, which is the same in every family."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    return LlamaRotaryEmbedding(config)  # type: ignore[arg-type]  # reads what all families have


def list_group_specs(
    config: PretrainedConfig, *, heads: str = "kv-groups"
) -> tuple[GroupSpec, ...]:
    """List the groups of every layer, heads before channels.

    A group of heads is one KV head with the ``n_rep`` query heads that read it, so that grouped-
    query attention stays grouped; a LLaMA-1 head is the case ``n_rep = 1``. Or it is one query
    head, all KV heads stay, and each keeps as many query heads. Biases of q, k and v follow their
    rows. Norms of single heads have one weight for all heads and need no cut.

    Args:
        config: A transformers config of a supported model type, unpruned (uniform widths).
        heads: What a group of heads is: ``kv-groups`` or ``query-heads``.

    Returns:
        ``layers.N.heads`` with ``num_key_value_heads`` or ``num_attention_heads`` groups, and
        ``layers.N.channels`` with ``intermediate_size`` groups, for each of
        ``num_hidden_layers`` layers.

    Source:
        LoRAPrune, arXiv:2305.18403, Appendix A and Figure 5, for KV heads; Minitron,
        arXiv:2407.14679, prunes query heads as well.
    """
    layers = range(config.num_hidden_layers)
    return tuple(spec for layer in layers for spec in list_layer_specs(config, layer, heads=heads))


def list_layer_specs(
    config: PretrainedConfig, layer: int, *, heads: str = "kv-groups"
) -> tuple[GroupSpec, GroupSpec]:
    """List the groups of one layer, heads and channels; see ``list_group_specs``."""
    build = {"kv-groups": _kv_groups, "query-heads": _query_heads}[heads]
    return build(config, layer), _channels(config, layer)


def _query_heads(config: PretrainedConfig, layer: int) -> GroupSpec:
    head_dim, prefix = get_head_dim(config), f"model.layers.{layer}.self_attn"
    return GroupSpec(
        name=f"layers.{layer}.heads",
        num_groups=config.num_attention_heads,
        slices=(
            Slice(f"{prefix}.q_proj", dim=0, block=head_dim),
            Slice(f"{prefix}.o_proj", dim=1, block=head_dim),
        ),
        clusters=config.num_key_value_heads,
        whole=(f"{prefix}.k_proj", f"{prefix}.v_proj"),
    )


def _kv_groups(config: PretrainedConfig, layer: int) -> GroupSpec:
    head_dim = get_head_dim(config)
    query_rows = config.num_attention_heads // config.num_key_value_heads * head_dim
    prefix = f"model.layers.{layer}.self_attn"
    return GroupSpec(
        name=f"layers.{layer}.heads",
        num_groups=config.num_key_value_heads,
        slices=(
            Slice(f"{prefix}.q_proj", dim=0, block=query_rows),
            Slice(f"{prefix}.k_proj", dim=0, block=head_dim),
            Slice(f"{prefix}.v_proj", dim=0, block=head_dim),
            Slice(f"{prefix}.o_proj", dim=1, block=query_rows),
        ),
    )


def _channels(config: PretrainedConfig, layer: int) -> GroupSpec:
    prefix = f"model.layers.{layer}.mlp"
    return GroupSpec(
        name=f"layers.{layer}.channels",
        num_groups=config.intermediate_size,
        slices=(
            Slice(f"{prefix}.gate_proj", dim=0, block=1),
            Slice(f"{prefix}.up_proj", dim=0, block=1),
            Slice(f"{prefix}.down_proj", dim=1, block=1),
        ),
    )


def count_group_parameters(spec: GroupSpec, config: PretrainedConfig) -> int:
    """Return the weights and biases that one group of ``spec`` owns."""
    total = 0
    for piece in spec.slices:
        total += piece.block * config.hidden_size
        total += piece.block * (piece.dim == 0 and has_bias(config, piece.module))
    return total


def has_bias(config: PretrainedConfig, module: str) -> bool:
    """Tell whether the projection named ``module`` has a bias in this model type."""
    name = module.rsplit(".", 1)[1]
    family = get_family(config.model_type)
    if family.biased is not None:
        return name in family.biased
    stated = "mlp_bias" if name in FFN_LINEARS else "attention_bias"
    return bool(getattr(config, stated, False))


def uses_silu(config: PretrainedConfig) -> bool:
    """Tell whether the FFN's activation is SiLU, as in every released model of these families."""
    return config.hidden_act in ("silu", "swish")


def expand_index(kept: Tensor, block: int) -> Tensor:
    """Turn kept groups into kept rows or columns: (G,) -> (G * block,)."""
    offsets = torch.arange(block, device=kept.device)
    return (kept.unsqueeze(1) * block + offsets).flatten()  # (G, block) -> (G * block,)
