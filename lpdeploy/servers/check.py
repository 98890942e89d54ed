"""What a ratio would give, before any training: the shape, its costs, and who loads it."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from lpdeploy.config import PruneConfig
from lpdeploy.errors import ArtifactError
from lpdeploy.families.groups import get_head_dim, list_group_specs
from lpdeploy.models.compact import find_base_config
from lpdeploy.models.costs import compute_decode_bytes, compute_prefill_flops
from lpdeploy.models.loading import find_config, has_tokenizer, load_tokenizer
from lpdeploy.models.shapes import (
    LayerWidths,
    build_pruned_config,
    compute_widths,
    count_parameters,
    forecast_config,
    forecast_widths,
    get_itemsize,
    list_widths,
)
from lpdeploy.plan import WidthRequest
from lpdeploy.run_folder import RunFolder
from lpdeploy.servers.gguf_vocab import build_vocabulary
from lpdeploy.servers.verdicts import LLAMA_CPP, Verdict, list_verdicts

# Rows and columns that a matrix kernel of a GPU works on at once. The last tile of a width that is
# no multiple is computed whole.
_TILE = 128
# Below multiples of 8, half precision leaves the tensor cores or pays for unaligned loads.
_ALIGNED = 8
_STEP = 0.01
_FAR = 0.2


@dataclass(frozen=True)
class Shape:
    """The numbers that a server looks at; a list with one number per layer where layers differ.

    Attributes:
        architecture: Class of transformers that loads the model.
        hidden_size: Width of the residual stream.
        layers: Number of decoder layers.
        head_dim: Width of a head.
        heads: Query heads.
        kv_heads: Key/value heads.
        channels: FFN channels.
    """

    architecture: str
    hidden_size: int
    layers: int
    head_dim: int
    heads: int | list[int]
    kv_heads: int | list[int]
    channels: int | list[int]


@dataclass(frozen=True)
class Costs:
    """What a model takes.

    Attributes:
        parameters: Number of weights, tied ones once.
        bytes: Their size in the checkpoint's own precision.
        prefill_flops: Floating-point operations of a prefill.
        decode_bytes: Bytes that are read to decode one token.
    """

    parameters: int
    bytes: int
    prefill_flops: float
    decode_bytes: float


@dataclass(frozen=True)
class Alignment:
    """How a width that a GPU multiplies by fits the tiles of its kernels.

    Attributes:
        width: Its name.
        size: Its size on one rank.
        multiple: Largest power of two up to 256 that divides it.
        aligned: Whether 8 divides it.
        waste: Share of the multiplications in tiles of 128 that are padding.
    """

    width: str
    size: int
    multiple: int
    aligned: bool
    waste: float


@dataclass(frozen=True)
class CheckResult:
    """What ``check`` found.

    Attributes:
        model: Folder or hub name that was given.
        ratio: Share of groups to remove; of a run, the one that was asked for.
        shape: The pruned model.
        before: Costs of the unpruned model.
        after: Costs of the pruned model.
        tokens: Length of the prefill, and of the context of a decoded token.
        tensor_parallel: GPUs that share the heads.
        alignment: How its widths fit a GPU.
        servers: What each server says of it.
        suggestion: The nearest request to whose shape no server objects, and that shape. None if
            this is such a shape or none is near.
    """

    model: str
    ratio: float
    shape: Shape
    before: Costs
    after: Costs
    tokens: int
    tensor_parallel: int
    alignment: list[Alignment]
    servers: list[Verdict]
    suggestion: tuple[WidthRequest, Shape] | None

    def to_json(self) -> dict[str, Any]:
        """Return what ``lpdeploy check --json`` prints; ``suggestion`` names fields to set."""
        data = asdict(replace(self, suggestion=None))
        if self.suggestion is not None:
            request, shape = self.suggestion
            data["suggestion"] = {"options": describe_request(request), **asdict(shape)}
        return data


def check(
    model: str,
    config: PruneConfig,
    *,
    tensor_parallel: int = 1,
    tokens: int = 2048,
    base: Path | None = None,
) -> CheckResult:
    """Say what a pruned model would be, what it would cost, and which servers would load it.

    Args:
        model: Folder or hub name of a model, of which the config is read, and the tokenizer if the
            folder has one. Or a run, whose plan then decides in place of ``config``.
        config: How the model would be pruned.
        tensor_parallel: GPUs over which the heads are divided.
        tokens: Length of the prefill, and of the context of a decoded token.
        base: Where the base model of a run lies now, if it was moved.

    Raises:
        ArtifactError: Model or run cannot be read.
        LpdeployError: All layers are protected.
    """
    run = RunFolder(model)
    if run.is_complete:
        plan = run.load_plan()
        folder = Path(base or plan.base_model)
        source = find_base_config(plan, base)
        pruned = build_pruned_config(source, compute_widths(source, plan.specs, plan.kept))
        ratio, nearest = plan.ratio, None
    else:
        folder, source = Path(model), find_config(model)
        pruned = forecast_config(source, config.widths)
        ratio = config.widths.compute_ratio(list_group_specs(source, heads=config.widths.heads))
        nearest = suggest(source, config.widths, ranks=tensor_parallel)
    verdicts = list_verdicts(pruned, tensor_parallel=tensor_parallel)
    return CheckResult(
        model=model,
        ratio=ratio,
        shape=describe_shape(pruned),
        before=compute_costs(source, tokens=tokens),
        after=compute_costs(pruned, tokens=tokens),
        tokens=tokens,
        tensor_parallel=tensor_parallel,
        alignment=list_alignment(pruned, ranks=tensor_parallel),
        servers=[_judge_tokenizer(verdict, folder, source) for verdict in verdicts],
        suggestion=None
        if nearest is None
        else (nearest, describe_shape(forecast_config(source, nearest))),
    )


def _judge_tokenizer(verdict: Verdict, folder: Path, config: PretrainedConfig) -> Verdict:
    """Let a server that takes the shape object to the tokenizer, if the folder has one."""
    if verdict.name != LLAMA_CPP or not has_tokenizer(folder):
        return verdict
    try:
        build_vocabulary(load_tokenizer(folder, config), rows=config.vocab_size)
    except ArtifactError as error:
        return replace(verdict, loads="no", why=str(error))
    return verdict


def describe_request(request: WidthRequest) -> str:
    """Write a request as fields of ``PruneConfig``, in backticks."""
    heads, channels = request.ratios["heads"], request.ratios["channels"]
    values: dict[str, float] = (
        {"ratio": heads} if heads == channels else {"head_ratio": heads, "channel_ratio": channels}
    )
    values["round_heads_to"] = request.multiples["heads"]
    values["round_to"] = request.multiples["channels"]
    words = [f"`{name}={value:g}`" for name, value in values.items()]
    if request.heads != WidthRequest.heads:
        words.append(f"`heads={request.heads!r}`")
    return " ".join(words)


def describe_shape(config: PretrainedConfig) -> Shape:
    """Read the shape of a model, pruned or not."""
    widths = list_widths(config)

    def merge(values: list[int]) -> int | list[int]:
        return values[0] if len(set(values)) == 1 else values

    return Shape(
        architecture=(config.architectures or [config.model_type])[0],
        hidden_size=config.hidden_size,
        layers=config.num_hidden_layers,
        head_dim=get_head_dim(config),
        heads=merge([width.heads for width in widths]),
        kv_heads=merge([width.kv_heads for width in widths]),
        channels=merge([width.channels for width in widths]),
    )


def compute_costs(config: PretrainedConfig, *, tokens: int) -> Costs:
    """Count parameters, bytes, and what a pass over so many tokens takes at least."""
    parameters, itemsize = count_parameters(config), get_itemsize(config)
    table = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return Costs(
        parameters=parameters,
        bytes=parameters * itemsize,
        prefill_flops=compute_prefill_flops(config, tokens=tokens, batch=1),
        decode_bytes=compute_decode_bytes(
            config,
            context=tokens,
            batch=1,
            weight_bytes=(parameters - table) * itemsize,
            cache_itemsize=itemsize,
        ),
    )


def list_alignment(config: PretrainedConfig, *, ranks: int = 1) -> list[Alignment]:
    """List how each width that a GPU multiplies by fits it; what layers share is listed once."""
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
        Alignment(
            width=name,
            size=size,
            multiple=min(size & -size, 256),
            aligned=size % _ALIGNED == 0,
            waste=1 - size / (-(-size // _TILE) * _TILE),
        )
        for name, size in sizes
    ]


def suggest(config: PretrainedConfig, request: WidthRequest, *, ranks: int) -> WidthRequest | None:
    """Return the request nearest to ``request`` that costs no server, if any is near.

    A server that objects to the unpruned model as well, such as one that runs on one GPU where
    several are asked for, does not count. Nearest are the heads and channels that differ least, as
    shares of the unpruned ones. Of equals, it is the request with the same ratios and the fewest
    changes.

    Returns:
        None where ``request`` itself costs no server, or nothing within a fifth of its ratios is
        better.
    """
    anyway = list_objectors(config, ranks=ranks)

    def costs_no_server(widths: Sequence[LayerWidths]) -> bool:
        return list_objectors(build_pruned_config(config, widths), ranks=ranks) <= anyway

    wanted = forecast_widths(config, request)
    if costs_no_server(wanted):
        return None
    candidates = [(own, forecast_widths(config, own)) for own in _list_requests(request)]
    candidates.sort(
        key=lambda pair: (
            _compute_distance(pair[1], wanted, config),
            *_list_changes(pair[0], request),
        )
    )
    return next((own for own, widths in candidates if costs_no_server(widths)), None)


def list_objectors(config: PretrainedConfig, *, ranks: int = 1) -> set[str]:
    """Return the servers that do not load a shape, or only on a condition."""
    verdicts = list_verdicts(config, tensor_parallel=ranks)
    return {verdict.name for verdict in verdicts if verdict.loads != "yes"}


def _list_requests(request: WidthRequest) -> Iterator[WidthRequest]:
    steps = range(-round(_FAR / _STEP), round(_FAR / _STEP) + 1)
    heads = sorted({request.multiples["heads"], 1, 2, 4, 8})
    channels = sorted({request.multiples["channels"], 32, 64, 128, 256})
    for step, head, channel in itertools.product(steps, heads, channels):
        ratios = {kind: round(own + step * _STEP, 4) for kind, own in request.ratios.items()}
        if all(0 < ratio < 1 for ratio in ratios.values()):
            yield replace(request, ratios=ratios, multiples={"heads": head, "channels": channel})


def _compute_distance(
    widths: Sequence[LayerWidths], wanted: Sequence[LayerWidths], config: PretrainedConfig
) -> float:
    """Return how far apart two shapes are, in shares of the unpruned model."""
    heads = sum(abs(a.heads - b.heads) for a, b in zip(widths, wanted, strict=True))
    channels = sum(abs(a.channels - b.channels) for a, b in zip(widths, wanted, strict=True))
    return heads / config.num_attention_heads + channels / config.intermediate_size


def _list_changes(candidate: WidthRequest, request: WidthRequest) -> tuple[bool, int]:
    """Return whether the ratios differ, and how many multiples do."""

    def differs(kind: str) -> bool:
        return candidate.multiples[kind] != request.multiples[kind]

    return candidate.ratios != request.ratios, sum(map(differs, request.multiples))


def describe_forecast(model: str, options: PruneConfig) -> str:
    """Write in a sentence who loads what a run will write.

    Raises:
        ArtifactError: The model's config cannot be read.
    """
    return describe_servers(list_verdicts(forecast_config(find_config(model), options.widths)))


def describe_servers(verdicts: Sequence[Verdict]) -> str:
    """Write in a sentence who loads a shape, as ``prune`` does before it starts.

    A server that nobody has tried is never said to load anything.
    """
    names: dict[str, list[str]] = {"yes": [], "untried": [], "condition": [], "no": []}
    for verdict in verdicts:
        untried = verdict.loads == "yes" and not verdict.tried
        names["untried" if untried else verdict.loads].append(verdict.name)
    parts = {
        "yes": "loads in {}",
        "untried": "should load in {} (not tried)",
        "condition": "loads on a condition in {}",
        "no": "does not load in {}",
    }
    said = [words.format(", ".join(names[key])) for key, words in parts.items() if names[key]]
    return f"The pruned model {'; '.join(said)}."
