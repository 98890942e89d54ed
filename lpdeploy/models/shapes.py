"""The shape of a pruned model: widths a layer, and the config that states them."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lpdeploy.families import get_family, name_per_layer
from lpdeploy.families.groups import count_group_parameters, get_head_dim
from lpdeploy.models.loading import get_model_classes
from lpdeploy.plan import GroupSpec, Kept

_AUTO_CLASSES = ("AutoConfig", "AutoModelForCausalLM")


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
    """Return the config of the pruned model: of a stock class where all layers are alike.

    A class of the project's own states widths that differ between layers, or a head count that no
    stock class of the family allows.

    Raises:
        LpdeployError: It takes such a class, and the family has none.
    """
    values = config.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "auto_map"):
        values.pop(name, None)
    values["head_dim"] = get_head_dim(config)
    uniform = len(set(widths)) == 1
    stated = _state_uniform(config, values, widths[0]) if uniform else None
    model_type, values = stated or _state_per_layer(config, values, widths)
    config_class, model_class = get_model_classes(model_type)
    pruned = config_class(**values)
    pruned.architectures = [model_class.__name__]
    return pruned


def _state_uniform(
    config: Any, values: Mapping[str, Any], width: LayerWidths
) -> tuple[str, dict[str, Any]] | None:
    """Return the stock model type and fields of a model whose layers are alike, if there are."""
    stated = {
        **values,
        "num_attention_heads": width.heads,
        "num_key_value_heads": width.kv_heads,
        "intermediate_size": width.channels,
    }
    carry = get_family(config.model_type).carry_odd_heads
    if carry is None or config.hidden_size % width.heads == 0:
        return config.model_type, stated
    return carry(stated)


def _state_per_layer(
    config: Any, values: Mapping[str, Any], widths: Sequence[LayerWidths]
) -> tuple[str, dict[str, Any]]:
    """Return the model type and fields of a model that states the widths of each layer."""
    model_type = name_per_layer(config.model_type)
    classes = dict(zip(_AUTO_CLASSES, get_model_classes(model_type), strict=True))
    return model_type, {
        **values,
        "layer_widths": [[width.kv_heads, width.channels] for width in widths],
        # Files beside the checkpoint, where ``compact`` copies the module of these classes.
        "auto_map": {
            auto: f"{Path(inspect.getfile(own)).stem}.{own.__name__}"
            for auto, own in classes.items()
        },
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
