"""What a ratio would give, before any training: the shape, its costs, and who loads it."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lpdeploy.families.groups import get_head_dim, list_group_specs
from lpdeploy.models.costs import compute_decode_bytes, compute_prefill_flops
from lpdeploy.models.loading import find_config
from lpdeploy.models.shapes import (
    LayerWidths,
    build_pruned_config,
    compute_widths,
    count_parameters,
    list_widths,
)
from lpdeploy.pruning.options import PruneOptions
from lpdeploy.pruning.selection import round_kept
from lpdeploy.run_folder import RunFolder
from lpdeploy.servers.verdicts import Verdict, list_verdicts

# Rows and columns that a matrix kernel of a GPU works on at once; the last tile of a width that is
# no multiple is computed whole.
_TILE = 128
# Below multiples of 8, half precision leaves the tensor cores or pays for unaligned loads.
_ALIGNED = 8
_STEP = 0.01
_FAR = 0.2


@dataclass(frozen=True)
class Target:
    """What decides the widths of a pruned model.

    Attributes:
        ratio: Share of groups to remove.
        round_to: Kept channels are multiples of this.
        round_heads_to: Kept KV heads are multiples of this.
        head_ratio: Share of the heads alone; None for ``ratio``.
        channel_ratio: Share of the FFN channels alone; None for ``ratio``.
    """

    ratio: float = 0.5
    round_to: int = 32
    round_heads_to: int = 1
    head_ratio: float | None = None
    channel_ratio: float | None = None

    def build_config(self, config: Any) -> Any:
        """Return the config of the pruned model, all layers alike."""
        kv_heads, channels = (
            round_kept(count, self.ratio if own is None else own, multiple=multiple)
            for count, own, multiple in (
                (config.num_key_value_heads, self.head_ratio, self.round_heads_to),
                (config.intermediate_size, self.channel_ratio, self.round_to),
            )
        )
        n_rep = config.num_attention_heads // config.num_key_value_heads
        widths = [LayerWidths(kv_heads * n_rep, kv_heads, channels)] * config.num_hidden_layers
        return build_pruned_config(config, widths)

    def describe(self) -> str:
        """Write it as options of ``prune``."""
        own = {"--head-ratio": self.head_ratio, "--channel-ratio": self.channel_ratio}
        ratios = [f"{flag} {ratio:g}" for flag, ratio in own.items() if ratio is not None]
        if len(ratios) < len(own):
            ratios = [f"--ratio {self.ratio:g}", *ratios]
        rounding = f"--round-heads-to {self.round_heads_to} --round-to {self.round_to}"
        return " ".join([*ratios, rounding])

    def shift(self, step: float) -> "Target":
        """Return it with all its ratios changed by ``step``."""

        def add(ratio: float | None) -> float | None:
            return None if ratio is None else round(ratio + step, 4)

        return replace(
            self,
            ratio=round(self.ratio + step, 4),
            head_ratio=add(self.head_ratio),
            channel_ratio=add(self.channel_ratio),
        )

    @property
    def is_possible(self) -> bool:
        """Whether something goes and something stays of each."""
        own = (self.head_ratio, self.channel_ratio)
        return all(0 < (self.ratio if ratio is None else ratio) < 1 for ratio in own)


def check(
    model: str, *, target: Target, tensor_parallel: int = 1, tokens: int = 2048
) -> dict[str, Any]:
    """Say what a pruned model would be, what it would cost, and which servers would load it.

    Args:
        model: Folder or hub name of a model, of which only the config is read; or a run, whose
            plan then decides, not ``target``.
        target: Ratio and rounding.
        tensor_parallel: GPUs over which the heads are divided.
        tokens: Length of the prefill, and of the context of a decoded token.

    Returns:
        ``shape``, ``before`` and ``after`` (parameters, bytes, FLOPs of a prefill, bytes read for
        a decoded token), ``alignment``, ``servers``, and ``suggestion``: the nearest options to
        whose shape no server objects, or None where this is such a shape or none is near.

    Raises:
        ArtifactError: Model or run cannot be read.
    """
    run = RunFolder(model)
    planned = run.is_complete
    if planned:
        plan = run.load_plan()
        config = find_config(plan.base_model)
        widths = compute_widths(config, list_group_specs(config), plan.kept)
        pruned = build_pruned_config(config, widths)
    else:
        config = find_config(model)
        pruned = target.build_config(config)
    verdicts = list_verdicts(pruned, tensor_parallel=tensor_parallel)
    nearest = None if planned else suggest(config, target, ranks=tensor_parallel)
    return {
        "model": model,
        "ratio": plan.ratio if planned else target.ratio,
        "shape": describe_shape(pruned),
        "before": compute_costs(config, tokens=tokens),
        "after": compute_costs(pruned, tokens=tokens),
        "tokens": tokens,
        "tensor_parallel": tensor_parallel,
        "alignment": list_alignment(pruned, ranks=tensor_parallel),
        "servers": [asdict(verdict) for verdict in verdicts],
        "suggestion": None
        if nearest is None
        else {"options": nearest.describe(), **describe_shape(nearest.build_config(config))},
    }


def forecast_config(config: Any, options: PruneOptions) -> Any:
    """Return the config of what a run will write, before its scores are known.

    With ``scope`` ``global`` they decide the widths: the first layer's are left whole then, so that
    layers differ, which is all that servers ask.
    """
    target = Target(
        options.ratio,
        options.round_to,
        options.round_heads_to,
        options.head_ratio,
        options.channel_ratio,
    )
    whole, pruned = (list_widths(shape) for shape in (config, target.build_config(config)))
    first = max(options.protect_first, int(options.scope == "global"))
    last = config.num_hidden_layers - options.protect_last
    return build_pruned_config(config, [*whole[:first], *pruned[first:last], *whole[last:]])


def describe_shape(config: Any) -> dict[str, Any]:
    """Return the numbers that a server looks at; a list a layer where layers differ."""
    widths = list_widths(config)

    def merge(values: list[int]) -> int | list[int]:
        return values[0] if len(set(values)) == 1 else values

    return {
        "architecture": config.architectures[0],
        "hidden_size": config.hidden_size,
        "layers": config.num_hidden_layers,
        "head_dim": get_head_dim(config),
        "heads": merge([width.heads for width in widths]),
        "kv_heads": merge([width.kv_heads for width in widths]),
        "channels": merge([width.channels for width in widths]),
    }


def compute_costs(config: Any, *, tokens: int) -> dict[str, float]:
    """Return parameters, bytes in the checkpoint's precision, and what a pass takes at least."""
    parameters = count_parameters(config)
    itemsize = config.dtype.itemsize if config.dtype is not None else 4
    table = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return {
        "parameters": parameters,
        "bytes": parameters * itemsize,
        "prefill_flops": compute_prefill_flops(config, tokens=tokens, batch=1),
        "decode_bytes": compute_decode_bytes(
            config,
            context=tokens,
            batch=1,
            weight_bytes=(parameters - table) * itemsize,
            cache_itemsize=itemsize,
        ),
    }


def list_alignment(config: Any, *, ranks: int = 1) -> list[dict[str, Any]]:
    """List, for each width that a GPU multiplies by, how it fits the tiles of its kernels.

    Returns:
        ``width`` (its name), ``size`` on one rank, ``multiple`` (the largest power of two up to
        256 that divides it), ``aligned`` (whether 8 does), and ``waste``: the share of
        multiplications in tiles of 128 that are padding. Widths that several layers share are
        listed once.
    """
    head_dim = get_head_dim(config)
    sizes = dict.fromkeys(
        (name, size // ranks)
        for width in list_widths(config)
        for name, size in (
            ("query rows", width.heads * head_dim),
            ("key rows", max(width.kv_heads, ranks) * head_dim),
            ("channels", width.channels),
        )
    )
    return [
        {
            "width": name,
            "size": size,
            "multiple": min(size & -size, 256),
            "aligned": size % _ALIGNED == 0,
            "waste": 1 - size / (-(-size // _TILE) * _TILE),
        }
        for name, size in sizes
    ]


def suggest(config: Any, target: Target, *, ranks: int) -> Target | None:
    """Return the options nearest to ``target`` that cost no server, if any are near.

    A server that objects to the unpruned model as well, such as one that runs on one GPU where
    several are asked for, does not count. Nearest are the heads and channels that differ least, in
    shares of the unpruned ones; of equals, the options with the same ratio and the fewest changes.

    Returns:
        None where ``target`` itself costs no server, or nothing within a fifth of its ratio is
        better.
    """
    anyway = list_objectors(config, ranks=ranks)
    wanted = target.build_config(config)
    if list_objectors(wanted, ranks=ranks) <= anyway:
        return None
    shapes = [(candidate, candidate.build_config(config)) for candidate in _list_targets(target)]
    near = sorted(
        (_compute_distance(shape, wanted, config), *_list_changes(candidate, target), index)
        for index, (candidate, shape) in enumerate(shapes)
    )
    for *_, index in near:
        candidate, shape = shapes[index]
        if list_objectors(shape, ranks=ranks) <= anyway:
            return candidate
    return None


def list_objectors(config: Any, *, ranks: int = 1) -> set[str]:
    """Return the servers that do not load a shape, or only on a condition."""
    verdicts = list_verdicts(config, tensor_parallel=ranks)
    return {verdict.name for verdict in verdicts if verdict.loads != "yes"}


def _list_targets(target: Target) -> Iterator[Target]:
    steps = range(-round(_FAR / _STEP), round(_FAR / _STEP) + 1)
    shifted = [target.shift(step * _STEP) for step in steps]
    heads = sorted({target.round_heads_to, 1, 2, 4, 8})
    channels = sorted({target.round_to, 32, 64, 128, 256})
    for candidate, head, channel in itertools.product(shifted, heads, channels):
        if candidate.is_possible:
            yield replace(candidate, round_heads_to=head, round_to=channel)


def _compute_distance(shape: Any, wanted: Any, config: Any) -> float:
    heads = abs(shape.num_key_value_heads - wanted.num_key_value_heads)
    channels = abs(shape.intermediate_size - wanted.intermediate_size)
    return heads / config.num_key_value_heads + channels / config.intermediate_size


def _list_changes(candidate: Target, target: Target) -> tuple[bool, int]:
    """Return whether the ratio is another, and how many of the options are."""
    changed = [value != asdict(target)[name] for name, value in asdict(candidate).items()]
    return candidate.ratio != target.ratio, sum(changed)


def describe_forecast(model: str, options: PruneOptions) -> str:
    """Write in a sentence who loads what a run will write.

    Raises:
        ArtifactError: The model's config cannot be read.
    """
    return describe_servers(list_verdicts(forecast_config(find_config(model), options)))


def describe_servers(verdicts: Sequence[Verdict]) -> str:
    """Write in a sentence who loads a shape: what ``prune`` says before it starts."""
    names: dict[str, list[str]] = {"yes": [], "condition": [], "no": []}
    for verdict in verdicts:
        names[verdict.loads].append(verdict.name)
    parts = (("loads in", "yes"), ("on a condition in", "condition"), ("not in", "no"))
    said = [f"{words} {', '.join(names[loads])}" for words, loads in parts if names[loads]]
    return f"The result {'; '.join(said)}"
