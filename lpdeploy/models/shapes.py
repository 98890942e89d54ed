"""The shape of a pruned model: from what was asked to the widths of each layer, and back.

Nothing else computes widths. What is asked is a ``WidthRequest``; widths become the config of a
pruned model, and the number of its parameters and bytes.
"""

import copy
import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from lpdeploy.errors import LpdeployError
from lpdeploy.families import get_family, name_per_layer
from lpdeploy.families.groups import (
    count_group_parameters,
    get_head_dim,
    list_group_specs,
    list_layer_specs,
)
from lpdeploy.models.loading import get_dtype, get_model_classes
from lpdeploy.plan import GroupSpec, Kept, WidthRequest, removes_kv_heads

_AUTO_CLASSES = ("AutoConfig", "AutoModelForCausalLM")


@dataclass(frozen=True)
class LayerWidths:
    """Widths of one decoder layer; all are 0 if it is dropped.

    Attributes:
        heads: Query heads.
        kv_heads: Key/value heads.
        channels: FFN channels.
    """

    heads: int
    kv_heads: int
    channels: int


def round_kept(num_groups: int, ratio: float, *, multiple: int) -> int:
    """Return how many of ``num_groups`` stay when ``ratio`` of them are removed.

    This is the nearest multiple, the larger one of two that are equally near. It is at least one
    multiple and at most all groups. Ratio 0 keeps all, even if their number is no multiple.
    """
    exact = (1 - ratio) * num_groups
    # The small term keeps 0.2 * 10 groups from falling below its tie through binary fractions.
    rounded = math.floor(exact / multiple + 0.5 + 1e-9) * multiple
    if ratio == 0:
        return num_groups
    return min(num_groups, max(multiple, rounded))


def round_spec(spec: GroupSpec, ratio: float, *, multiples: Mapping[str, int]) -> int:
    """Return how many groups of a spec stay: ``round_kept``, and as many in each cluster."""
    return round_kept(spec.num_groups, ratio, multiple=_get_multiple(spec, multiples))


def list_counts(spec: GroupSpec, *, multiples: Mapping[str, int]) -> list[int]:
    """List how many groups of a spec may stay: the multiples, and all of them."""
    multiple, whole = _get_multiple(spec, multiples), spec.num_groups
    return [*range(min(multiple, whole), whole, multiple), whole]


def _get_multiple(spec: GroupSpec, multiples: Mapping[str, int]) -> int:
    return math.lcm(multiples[spec.kind], spec.clusters)


def list_prunable(config: PretrainedConfig, request: WidthRequest) -> tuple[GroupSpec, ...]:
    """List the groups that may be removed: those of the layers that are not protected.

    Which layers are dropped is not known yet, so these are among them.

    Raises:
        LpdeployError: All layers are protected, or as many are dropped as are not; or each KV head
            has one query head, which cannot go without it.
    """
    _check_request(config, request)
    last = config.num_hidden_layers - request.protect_last
    specs = list_group_specs(config, heads=request.heads)
    return tuple(spec for spec in specs if request.protect_first <= spec.layer < last)


def _check_request(config: PretrainedConfig, request: WidthRequest) -> None:
    """Check that a model has what is asked to go; raises as ``list_prunable``."""
    if request.heads == "query-heads" and config.num_attention_heads == config.num_key_value_heads:
        raise LpdeployError(
            "`heads='query-heads'` removes some of the query heads that share a KV head, and each "
            "KV head of this model has one. Use `heads='kv-groups'`."
        )
    protected = request.protect_first + request.protect_last
    layers = config.num_hidden_layers - protected
    if layers <= 0:
        raise LpdeployError(
            f"`protect_first` {request.protect_first} and `protect_last` {request.protect_last} "
            f"leave none of the {config.num_hidden_layers} layers to prune. Protect fewer."
        )
    if request.drop_layers and request.drop_layers >= layers:
        raise LpdeployError(
            f"`drop_layers` {request.drop_layers} leaves none of the {layers} layers"
            f"{' that are not protected' if protected else ''}. Drop at most {layers - 1}."
        )


def count_kept(config: PretrainedConfig, request: WidthRequest) -> dict[str, int]:
    """Count the groups of each kind that an unprotected layer keeps, on average over layers."""
    return {
        spec.kind: round_spec(spec, request.ratios[spec.kind], multiples=request.multiples)
        for spec in list_layer_specs(config, 0, heads=request.heads)  # or of any other
    }


def compute_ratios(specs: Sequence[GroupSpec], kept: Sequence[int]) -> dict[str, float]:
    """Return the ratio of each kind that leaves so many of its groups in each layer.

    They are rounded to a millionth, which is less than half a group of any known layer.

    Args:
        specs: Of one layer.
        kept: Number of groups of each that stay.
    """
    pairs = zip(specs, kept, strict=True)
    return {spec.kind: round(1 - count / spec.num_groups, 6) for spec, count in pairs}


def forecast_widths(config: PretrainedConfig, request: WidthRequest) -> list[LayerWidths]:
    """Return the widths of every layer as far as they are known before groups are scored.

    With ``scope`` ``global`` the scores decide the width of each layer. The first layer is left
    whole in the forecast then, so that layers differ, which is all that servers look at. Likewise
    it drops the last layers that may be dropped, as all are of one size.
    """
    _check_request(config, request)
    kept, (heads, _) = count_kept(config, request), list_layer_specs(config, 0, heads=request.heads)
    pruned = _build_widths(config, heads, kept["heads"], kept["channels"])
    first = max(request.protect_first, int(request.scope == "global"))
    last = config.num_hidden_layers - request.protect_last
    widths = [
        pruned if first <= layer < last else whole
        for layer, whole in enumerate(list_widths(config))
    ]
    widths[last - request.drop_layers : last] = [LayerWidths(0, 0, 0)] * request.drop_layers
    return widths


def forecast_config(config: PretrainedConfig, request: WidthRequest) -> PretrainedConfig:
    """Return the config of the pruned model, with the widths of ``forecast_widths``."""
    return build_pruned_config(config, forecast_widths(config, request))


def list_widths(config: PretrainedConfig) -> list[LayerWidths]:
    """List the widths of every layer of a model, uniform or not."""
    n_rep = config.num_attention_heads // config.num_key_value_heads
    uniform = [[config.num_key_value_heads, config.intermediate_size]] * config.num_hidden_layers
    pairs = getattr(config, "layer_widths", uniform)
    return [LayerWidths(kv_heads * n_rep, kv_heads, channels) for kv_heads, channels in pairs]


def list_projections(config: PretrainedConfig, width: LayerWidths) -> list[tuple[int, int]]:
    """List (in, out) of the projections of a layer: q, k, v, o, gate, up, down."""
    hidden, head_dim = config.hidden_size, get_head_dim(config)
    query, key = width.heads * head_dim, width.kv_heads * head_dim
    return [
        *((hidden, query), (hidden, key), (hidden, key), (query, hidden)),
        *((hidden, width.channels), (hidden, width.channels), (width.channels, hidden)),
    ]


def compute_widths(
    config: PretrainedConfig, specs: Sequence[GroupSpec], kept: Kept
) -> list[LayerWidths]:
    """Return the widths that ``kept`` leaves in each layer of the unpruned ``config``."""
    counts = {(spec.layer, spec.kind): len(kept[spec.name]) for spec in specs}
    return [
        _build_widths(config, spec, counts[spec.layer, "heads"], counts[spec.layer, "channels"])
        for spec in specs
        if spec.kind == "heads"
    ]


def _build_widths(
    config: PretrainedConfig, spec: GroupSpec, heads: int, channels: int
) -> LayerWidths:
    """Return the widths of a layer that keeps so many groups of heads, and so many channels."""
    if removes_kv_heads(spec):
        n_rep = config.num_attention_heads // config.num_key_value_heads
        return LayerWidths(heads * n_rep, heads, channels)
    return LayerWidths(heads, config.num_key_value_heads if heads else 0, channels)


def build_pruned_config(
    config: PretrainedConfig, widths: Sequence[LayerWidths]
) -> PretrainedConfig:
    """Return the config of the pruned model: of a stock class where all layers are alike.

    A class of the project's own states widths that differ between layers, or a head count that no
    stock class of the family allows.

    Args:
        config: Of the unpruned model.
        widths: Of each of its layers.

    Raises:
        LpdeployError: It takes such a class, and the family has none.
    """
    stay = [layer for layer, width in enumerate(widths) if width.channels]
    widths = [widths[layer] for layer in stay]
    config = copy.deepcopy(config)
    set_depth(config, stay)
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


def set_depth(config: PretrainedConfig, stay: Sequence[int]) -> None:
    """Let a config state that only some of its layers stay.

    Args:
        config: Of the unpruned model; changed in place.
        stay: Layers that stay, ascending.
    """
    config.num_hidden_layers = len(stay)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in stay]


def _state_uniform(
    config: PretrainedConfig, values: Mapping[str, Any], width: LayerWidths
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
    config: PretrainedConfig, values: Mapping[str, Any], widths: Sequence[LayerWidths]
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


def count_parameters(config: PretrainedConfig) -> int:
    """Return the parameters of a model, tied ones once, without allocating any."""
    _, model_class = get_model_classes(config.model_type)
    with torch.device("meta"):
        model = model_class(config)
    model.tie_weights()
    return sum(parameter.numel() for parameter in model.parameters())


def get_itemsize(config: PretrainedConfig) -> int:
    """Return the bytes of one weight in the checkpoint's own precision."""
    return get_dtype(config).itemsize


KINDS = ("heads", "channels")
"""Kinds of groups."""


def build_counter(
    config: PretrainedConfig, request: WidthRequest, *, kinds: Sequence[str] = KINDS
) -> Callable[[float], int]:
    """Return a function that counts the parameters that one ratio for all groups leaves.

    Args:
        config: Of the unpruned model.
        request: What decides the widths, but for the ratios.
        kinds: Kinds of groups that the ratio is for; all others stay.

    With ``scope`` ``global`` scores decide where groups are removed, and the number of parameters
    may vary by less than a rounding step. The function returns the most that may be left.

    Raises:
        LpdeployError: All layers are protected.
    """
    whole = replace(request, ratios={"heads": 0.0, "channels": 0.0}, scope="layer")
    dense = count_parameters(forecast_config(config, whole))
    prunable = list_prunable(config, request)
    stay = prunable[2 * request.drop_layers :]  # two specs a layer; all layers are of one size
    ordered = sorted(stay, key=lambda spec: spec.kind)
    families = [
        list(specs)
        for kind, specs in itertools.groupby(ordered, key=lambda spec: spec.kind)
        if kind in kinds
    ]

    def count(ratio: float) -> int:
        removed = 0
        for specs in families:
            total = sum(spec.num_groups for spec in specs)
            kept = _count_most(specs, ratio, request)
            removed += (total - kept) * count_group_parameters(specs[0], config)
        return dense - removed

    return count


def _count_most(specs: Sequence[GroupSpec], ratio: float, request: WidthRequest) -> int:
    """Count the groups of one kind that stay in all layers together, at most."""
    if request.scope == "layer":
        return sum(round_spec(spec, ratio, multiples=request.multiples) for spec in specs)
    multiple = request.multiples[specs[0].kind]
    total = sum(spec.num_groups for spec in specs)
    # Groups leave in chunks and end on the count exactly, unless a layer's first chunk is smaller.
    uneven = any(spec.num_groups % multiple for spec in specs)
    wanted = round_kept(total, ratio, multiple=multiple) + (multiple - 1 if uneven else 0)
    fewest = sum(min(multiple, spec.num_groups) for spec in specs)
    return min(total, max(wanted, fewest))


def compute_achieved(
    config: PretrainedConfig, specs: Sequence[GroupSpec], kept: Kept
) -> Mapping[str, float]:
    """Return the share removed: of ``groups``, ``heads``, ``channels``, ``layers``, ``parameters``.

    Shares are of the whole model, protected layers, embeddings and head included.
    """

    def share(chosen: Sequence[GroupSpec]) -> float:
        total = sum(spec.num_groups for spec in chosen)
        return 1 - sum(len(kept[spec.name]) for spec in chosen) / total

    dropped = [width.channels == 0 for width in compute_widths(config, specs, kept)]
    removed = sum(
        (spec.num_groups - len(kept[spec.name])) * count_group_parameters(spec, config)
        for spec in specs
    )
    removed += sum(dropped) * (_count_beside_groups(config, specs) if any(dropped) else 0)
    return {
        "groups": share(specs),
        "heads": share([spec for spec in specs if spec.kind == "heads"]),
        "channels": share([spec for spec in specs if spec.kind == "channels"]),
        "layers": sum(dropped) / len(dropped),
        "parameters": removed / count_parameters(config),
    }


def _count_beside_groups(config: PretrainedConfig, specs: Sequence[GroupSpec]) -> int:
    """Count the parameters of a layer that belong to no group, such as its norms."""
    fewer = copy.deepcopy(config)
    set_depth(fewer, range(config.num_hidden_layers - 1))
    layer = count_parameters(config) - count_parameters(fewer)
    own = [spec for spec in specs if spec.layer == 0]
    return layer - sum(spec.num_groups * count_group_parameters(spec, config) for spec in own)
