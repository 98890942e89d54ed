"""The shape of a pruned model: widths a layer, and the config that states them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lpdeploy.families.groups import (
    SUPPORTED_MODEL_TYPES,
    count_group_parameters,
    get_head_dim,
)
from lpdeploy.models.loading import PER_LAYER_PREFIX, get_model_classes
from lpdeploy.plan import GroupSpec, Kept

_NOT_IN_MISTRAL = ("attention_bias", "mlp_bias", "pretraining_tp")


@dataclass(frozen=True)
class LayerWidths:
    """Widths of one decoder layer.

    Attributes:
        heads: Query heads.
        kv_heads: Key/value heads.
        channels: FFN channels.
    """

    heads: int
    kv_heads: int
    channels: int


def list_widths(config: Any) -> list[LayerWidths]:
    """List the widths of every layer of a model, uniform or not."""
    n_rep = config.num_attention_heads // config.num_key_value_heads
    uniform = [[config.num_key_value_heads, config.intermediate_size]] * config.num_hidden_layers
    pairs = getattr(config, "layer_widths", uniform)
    return [LayerWidths(kv_heads * n_rep, kv_heads, channels) for kv_heads, channels in pairs]


def list_projections(config: Any, width: LayerWidths) -> list[tuple[int, int]]:
    """List (in, out) of the projections of a layer: q, k, v, o, gate, up, down."""
    hidden, head_dim = config.hidden_size, get_head_dim(config)
    query, key = width.heads * head_dim, width.kv_heads * head_dim
    return [
        *((hidden, query), (hidden, key), (hidden, key), (query, hidden)),
        *((hidden, width.channels), (hidden, width.channels), (width.channels, hidden)),
    ]


def compute_widths(config: Any, specs: Sequence[GroupSpec], kept: Kept) -> list[LayerWidths]:
    """Return the widths that ``kept`` leaves in each layer of the unpruned ``config``."""
    n_rep = config.num_attention_heads // config.num_key_value_heads
    counts = {(spec.layer, spec.kind): len(kept[spec.name]) for spec in specs}
    return [
        LayerWidths(
            heads=counts[layer, "heads"] * n_rep,
            kv_heads=counts[layer, "heads"],
            channels=counts[layer, "channels"],
        )
        for layer in range(config.num_hidden_layers)
    ]


def build_pruned_config(config: Any, widths: Sequence[LayerWidths]) -> Any:
    """Return the config of the pruned model: stock where all layers are alike.

    transformers' ``LlamaConfig`` refuses a hidden size that the head count does not divide, even
    with an explicit ``head_dim``. ``MistralConfig`` without a sliding window is the same
    computation and has no such check, so it carries those LLaMAs. Only widths that differ between
    layers (or an undivided LLaMA with biases, which Mistral lacks) need the project's own class.
    """
    values = config.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "auto_map"):
        values.pop(name, None)
    values["head_dim"] = get_head_dim(config)
    model_type = _choose_model_type(config, widths)
    if model_type.startswith(PER_LAYER_PREFIX):
        values["layer_widths"] = [[w.kv_heads, w.channels] for w in widths]
        values["auto_map"] = _auto_map(model_type)
    else:
        values["num_attention_heads"] = widths[0].heads
        values["num_key_value_heads"] = widths[0].kv_heads
        values["intermediate_size"] = widths[0].channels
    if model_type == "mistral" and config.model_type == "llama":
        values = {k: v for k, v in values.items() if k not in _NOT_IN_MISTRAL}
        values["sliding_window"] = None
    config_class, model_class = get_model_classes(model_type)
    pruned = config_class(**values)
    pruned.architectures = [model_class.__name__]
    return pruned


def _choose_model_type(config: Any, widths: Sequence[LayerWidths]) -> str:
    if len(set(widths)) > 1:
        return PER_LAYER_PREFIX + config.model_type
    if config.model_type != "llama" or config.hidden_size % widths[0].heads == 0:
        return config.model_type
    if config.attention_bias or config.mlp_bias:
        return PER_LAYER_PREFIX + config.model_type
    return "mistral"


def _auto_map(model_type: str) -> dict[str, str]:
    stem = SUPPORTED_MODEL_TYPES[model_type.removeprefix(PER_LAYER_PREFIX)].removesuffix(
        "ForCausalLM"
    )
    return {
        "AutoConfig": f"modeling_per_layer.PerLayer{stem}Config",
        "AutoModelForCausalLM": f"modeling_per_layer.PerLayer{stem}ForCausalLM",
    }


def count_parameters(config: Any) -> int:
    """Return the parameters of a model, tied ones once, without allocating any."""
    _, model_class = get_model_classes(config.model_type)
    with torch.device("meta"):
        model = model_class(config)
    model.tie_weights()
    return sum(parameter.numel() for parameter in model.parameters())


def compute_achieved(config: Any, specs: Sequence[GroupSpec], kept: Kept) -> Mapping[str, float]:
    """Return the share removed of all ``groups``, of ``heads``, ``channels`` and ``parameters``.

    Shares are of the whole model, protected layers, embeddings and head included.
    """

    def share(chosen: Sequence[GroupSpec]) -> float:
        total = sum(spec.num_groups for spec in chosen)
        return 1 - sum(len(kept[spec.name]) for spec in chosen) / total

    removed = sum(
        (spec.num_groups - len(kept[spec.name])) * count_group_parameters(spec, config)
        for spec in specs
    )
    return {
        "groups": share(specs),
        "heads": share([spec for spec in specs if spec.kind == "heads"]),
        "channels": share([spec for spec in specs if spec.kind == "channels"]),
        "parameters": removed / count_parameters(config),
    }
