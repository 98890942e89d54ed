"""From what a user asked for or left open to options that say it all.

A size or a latency becomes ratios, an open depth a number of layers, an open rate a number.
"""

import bisect
import itertools
import json
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from transformers import PretrainedConfig

from lpdeploy.benchmark.depth import choose_depth, spread
from lpdeploy.benchmark.latency_target import OutOfReachError, choose_widths
from lpdeploy.benchmark.rate import choose_rate
from lpdeploy.benchmark.trial_cache import open_trial_cache
from lpdeploy.config import PruneConfig
from lpdeploy.data.batches import Progress, TokenDataset
from lpdeploy.environment import count_ranks
from lpdeploy.errors import ArtifactError, LpdeployError, quote_error
from lpdeploy.machine import format_bytes
from lpdeploy.models.loading import find_config
from lpdeploy.models.shapes import (
    KINDS,
    build_counter,
    count_parameters,
    forecast_widths,
    get_itemsize,
)
from lpdeploy.plan import HEADS
from lpdeploy.pruning.fit import check_memory
from lpdeploy.pruning.ranks import OTHER_START, join_ranks
from lpdeploy.pruning.setup import Source, check_refit_data, load_dataset, load_source
from lpdeploy.pruning.target import (
    RateTrial,
    SizeFound,
    TargetRecord,
    describe_asked,
    load_target,
)
from lpdeploy.run_folder import RunFolder

logger = logging.getLogger(__name__)

# Ratios have six decimals: less than half a group of any known layer.
_STEPS = 1_000_000

_Value = TypeVar("_Value")


def resolve_options(  # noqa: PLR0913 - what prune takes, and callbacks
    model: str,
    options: PruneConfig,
    *,
    data: str | None = None,
    output: Path | None = None,
    cache: bool = True,
    resume: bool = False,
    overwrite: bool = False,
    stop: threading.Event | None = None,
    on_tokenize: Progress | None = None,
) -> tuple[PruneConfig, TargetRecord | None]:
    """Turn a budget (``target_params``, ``target_memory`` or ``target_latency``) into ratios.

    Where the depth or the kind of heads is open, it is chosen with them. An open learning rate is
    chosen last, for the shape that is then known.

    Args:
        model: Hugging Face folder or hub name. For a size alone only the config is read.
        options: How the model will be pruned. They are returned as they are if nothing is open.
        data: What groups are scored with; not needed for a size alone.
        output: The run folder to be, if there is one. Nothing is written.
        cache: Keep the tokens of ``data`` and the losses of trials, and use those of an earlier
            run.
        resume: Read from ``output`` what was chosen when the run began.
        overwrite: Whether a run in ``output`` may be replaced.
        stop: Set it to end trials of learning rates after the current step.
        on_tokenize: Is told (examples tokenized, all examples).

    Returns:
        The options with what was chosen in place of what was open, and the record for
        ``target.json``.

    Raises:
        LpdeployError: The model is small or fast enough already, or cannot become so; or a
            latency cannot be measured here.
        ValueError: ``data`` is missing where it is needed, or ``output`` for ``resume``.
    """
    if not options.is_open:
        return options, None
    given = _Given(model, data, output, cache, overwrite, stop, on_tokenize)
    if resume:
        record = load_target(_require(output, "output"), describe_asked(options))
    else:
        record = _choose_shape(given, options)
    if not resume and isinstance(options.lr, str):
        record = replace(record, rates=tuple(_try_rates(given, _fill_in(options, record))))
    resolved = _fill_in(options, record)
    if resolved.is_open:
        raise ArtifactError(
            "target.json lacks what was chosen. Use `overwrite=True` to start anew."
        )
    chosen = {**record.ratios, **({"lr": resolved.lr} if options.lr == "auto" else {})}
    words = " ".join(f"`{name}={_write(value)}`" for name, value in chosen.items())
    logger.info("%s: %s", "as chosen when the run began" if resume else "chosen", words)
    return resolved, record


@dataclass(frozen=True)
class _Given:
    """What trials are made with; as in ``resolve_options``."""

    model: str
    data: str | None
    output: Path | None
    cache: bool
    overwrite: bool
    stop: threading.Event | None
    on_tokenize: Progress | None

    def load_source(self, options: PruneConfig, *, ranks: int = 1) -> Source:
        """Find the base, and refuse a run that could not begin."""
        source = load_source(self.model, options)
        if self.output is not None:
            folder = RunFolder(self.output)
            folder.check_free(base=source.folder, resume=False, overwrite=self.overwrite)
        check_memory(source.config, replace(options, depth=None), ranks=ranks)
        return source

    def load_dataset(self, source: Source, options: PruneConfig) -> TokenDataset:
        """Tokenize the data."""
        data = _require(self.data, "data")
        return load_dataset(source, data, options, cache=self.cache, on_progress=self.on_tokenize)

    def choose_widths(self, options: PruneConfig) -> TargetRecord:
        """Choose the ratios for a target of latency."""
        return choose_widths(
            self.model,
            options,
            data=_require(self.data, "data"),
            output=self.output,
            cache=self.cache,
            overwrite=self.overwrite,
            on_tokenize=self.on_tokenize,
        )


def _fill_in(options: PruneConfig, record: TargetRecord) -> PruneConfig:
    """Return options with what a record says was chosen for them."""
    try:
        resolved = options.with_ratios(**record.ratios)
        is_open = isinstance(options.lr, str) and record.rates
        return replace(resolved, lr=record.rates[0].lr) if is_open else resolved
    except ValueError as error:
        raise ArtifactError(
            f"target.json cannot be used: {quote_error(error)}. Use `overwrite=True` to start anew."
        ) from error


def _try_rates(given: _Given, options: PruneConfig) -> list[RateTrial]:
    ranks = join_ranks(options, stop=given.stop)
    source = given.load_source(options, ranks=ranks.size)
    dataset = given.load_dataset(source, options)
    ranks.check_same(json.dumps([options.to_json(), dataset.sha256]), otherwise=OTHER_START)
    check_refit_data(source, dataset, options)
    return choose_rate(source, dataset, options, ranks=ranks)


def _choose_shape(given: _Given, options: PruneConfig) -> TargetRecord:
    if not options.has_open_shape:
        return TargetRecord(asked=describe_asked(options), ratios={})
    tried = "auto" in (options.depth, options.heads)
    if options.target_latency is None and not tried:
        config = find_config(given.model)
        limit = _get_limit(config, options)
        _refuse_unreachable(given.model, config, options, limit=limit)
        return _fit_ratio(config, options, limit=limit)
    _refuse_ranks(options)
    _require(given.data, "data")  # before anything is read
    if not tried:
        return given.choose_widths(options)
    source = given.load_source(options)
    if options.target_latency is None:
        limit = _get_limit(source.config, options)
        depths = _list_depths(source, options, limit=limit)
        candidates = _list_candidates(source.config, options, depths=depths, limit=limit)
    else:
        candidates = _list_quick(source, options, given.choose_widths)
    dataset = given.load_dataset(source, options)
    known = open_trial_cache(source, dataset, options, cache=given.cache)
    return choose_depth(source, dataset, options, candidates, cache=known)


def _list_quick(
    source: Source, options: PruneConfig, measure: Callable[[PruneConfig], TargetRecord]
) -> list[TargetRecord]:
    """List what to try for a latency: the best widths of each depth, with each kind of heads.

    Depths go up to half of the layers.
    """
    layers = len({spec.layer for spec in source.prunable})
    depths = spread(range(layers // 2 + 1)) if options.depth else [options.drop_layers or 0]
    found: dict[tuple[Any, ...], TargetRecord] = {}
    asked = describe_asked(options)
    for drop_layers, kind in itertools.product(depths, _settle_heads(source.config, options)):
        fixed = replace(kind, depth=None, drop_layers=drop_layers)
        try:
            record = measure(fixed)
        except OutOfReachError as error:
            logger.info("%s", error)
            unreachable = error
            continue
        enough = not any(record.ratios.values())
        record = replace(
            record, asked=asked, ratios={**record.ratios, **_name_choice(fixed, options)}
        )
        widths = forecast_widths(source.config, fixed.with_ratios(**record.ratios).widths)
        found.setdefault(tuple(widths), record)
        if enough:
            break  # the dropped layers are enough
    if not found:
        raise unreachable
    return list(found.values())


def _name_choice(fixed: PruneConfig, options: PruneConfig) -> dict[str, float | str]:
    """Return the number of dropped layers of a candidate, and its kind of heads if that is open."""
    chosen: dict[str, float | str] = {"drop_layers": fixed.drop_layers or 0}
    if fixed.heads and options.heads == "auto":
        chosen |= {"heads": fixed.heads}
    return chosen


def _list_candidates(
    config: PretrainedConfig, options: PruneConfig, *, depths: Sequence[int], limit: int
) -> list[TargetRecord]:
    """List what to try: for each depth the same ratio for all groups, and one for channels alone.

    Where a layer has few KV heads, one of them is a large step. If the kind of heads is open, the
    same ratio is tried for either kind.
    """
    found: dict[tuple[Any, ...], TargetRecord] = {}
    asked = describe_asked(options)
    for drop_layers, kind in itertools.product(depths, _settle_heads(config, options)):
        fixed = replace(kind, depth=None, drop_layers=drop_layers)
        chosen = _name_choice(fixed, options)
        for kinds in (KINDS, ("channels",)):
            if build_counter(config, fixed.widths, kinds=kinds)(1 - 1 / _STEPS) > limit:
                continue  # channels alone may not be enough
            record = _fit_ratio(config, fixed, limit=limit, kinds=kinds)
            record = replace(record, asked=asked, ratios={**record.ratios, **chosen})
            widths = forecast_widths(config, fixed.with_ratios(**record.ratios).widths)
            found.setdefault(tuple(widths), record)
    return list(found.values())


def _settle_heads(config: PretrainedConfig, options: PruneConfig) -> list[PruneConfig]:
    """Return the options with each kind of heads that may be chosen."""
    if options.heads != "auto":
        return [options]
    # Where each KV head has one query head, they are the same.
    shared = config.num_attention_heads > config.num_key_value_heads
    return [replace(options, heads=heads) for heads in (HEADS if shared else HEADS[:1])]


def _build_fewest_counter(config: PretrainedConfig, options: PruneConfig) -> Callable[[float], int]:
    """Return what counts the parameters that a ratio leaves, with the heads that leave fewest."""
    counters = [build_counter(config, kind.widths) for kind in _settle_heads(config, options)]
    return lambda ratio: min(count(ratio) for count in counters)


def _list_depths(source: Source, options: PruneConfig, *, limit: int) -> list[int]:
    """List numbers of dropped layers with which some widths leave no more than a limit."""
    layers = len({spec.layer for spec in source.prunable})
    depths = []
    for drop_layers in range(layers) if options.depth else [options.drop_layers or 0]:
        fixed = replace(options, depth=None, drop_layers=drop_layers)
        count = _build_fewest_counter(source.config, fixed)
        if count(1 - 1 / _STEPS) <= limit:
            depths.append(drop_layers)
        if count(0) <= limit:
            break
    if not depths or count_parameters(source.config) <= limit:  # out of reach, or there already
        most = layers - 1 if options.depth else options.drop_layers
        fixed = replace(options, depth=None, drop_layers=most)
        _refuse_unreachable(source.name, source.config, fixed, limit=limit)
    return spread(depths)


def _write(value: float | str) -> str:
    return repr(value) if isinstance(value, str) else f"{value:g}"


def _require(value: _Value | None, name: str) -> _Value:
    if value is None:
        raise ValueError(f"`{name}` is needed to resolve this target; give it.")
    return value


def _fit_ratio(
    config: PretrainedConfig, options: PruneConfig, *, limit: int, kinds: Sequence[str] = KINDS
) -> TargetRecord:
    """Find the smallest ratio whose rounded shape is small enough, if there is one.

    Args:
        config: Of the unpruned model.
        options: How it will be pruned.
        limit: Most parameters that may be left.
        kinds: Kinds of groups that go; the others stay.
    """
    itemsize = 1 if options.target_memory is None else get_itemsize(config)
    count = build_counter(config, options.widths, kinds=kinds)
    step = bisect.bisect_left(range(_STEPS), -limit, key=lambda s: -count(s / _STEPS))
    ratio = step / _STEPS
    own = {"head_ratio": 0.0, "channel_ratio": ratio}
    return TargetRecord(
        asked=describe_asked(options),
        ratios={"ratio": ratio} if kinds == KINDS else own,
        found=SizeFound(itemsize * count_parameters(config), itemsize * count(ratio)),
    )


def _get_limit(config: PretrainedConfig, options: PruneConfig) -> int:
    """Return the most parameters that may be left."""
    if options.target_params is not None:
        return options.target_params
    if options.target_memory is not None:
        return options.target_memory // get_itemsize(config)
    assert options.ratio is not None  # set where there is no budget
    return _build_fewest_counter(config, options)(options.ratio)


def _refuse_unreachable(
    name: str, config: PretrainedConfig, options: PruneConfig, *, limit: int
) -> None:
    def write(size: int) -> str:
        if options.target_memory is not None:
            size *= get_itemsize(config)
            return f"{format_bytes(size)} ({size:,} bytes)"
        return f"{size:,} parameters"

    asked = f"`{options.budget}` of {write(limit)}"
    if options.budget is None:
        raise LpdeployError(f"`ratio` {options.ratio:g} removes nothing of '{name}'. Give more.")
    before = count_parameters(config)
    least = _build_fewest_counter(config, options)(1 - 1 / _STEPS)
    if before <= limit:
        raise LpdeployError(
            f"{asked}: '{name}' has {write(before)} already. Give less, or prune to a `ratio`."
        )
    if least > limit:
        raise LpdeployError(
            f"{asked} is out of reach: embeddings, head, norms, "
            "protected layers and the fewest groups that every layer keeps are "
            f"{write(least)} of '{name}'. Give at least that."
        )


def _refuse_ranks(options: PruneConfig) -> None:
    if count_ranks() > 1:
        measured = (name for name in ("target_latency", "depth") if getattr(options, name))
        open_option = next(measured, "heads")
        raise LpdeployError(
            f"`{open_option}` is measured by one process, and a launcher started several. Start "
            "the command once without the launcher, stop it when it has told the ratios, and give "
            "those to the launcher."
        )
