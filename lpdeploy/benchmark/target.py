"""From the size or latency that a user asked for to the ratios that meet it."""

import bisect
import logging
from pathlib import Path
from typing import TypeVar

from lpdeploy.benchmark.latency_target import choose_widths
from lpdeploy.config import PruneConfig
from lpdeploy.data.batches import Progress
from lpdeploy.environment import count_ranks
from lpdeploy.errors import LpdeployError
from lpdeploy.machine import format_bytes
from lpdeploy.models.loading import find_config
from lpdeploy.models.shapes import build_counter, get_itemsize
from lpdeploy.pruning.target import SizeFound, TargetRecord, describe_asked, load_target

logger = logging.getLogger(__name__)

# Ratios have six decimals: less than half a group of any known layer.
_STEPS = 1_000_000

_Value = TypeVar("_Value")


def resolve_budget(  # noqa: PLR0913 - what prune takes, and callbacks
    model: str,
    options: PruneConfig,
    *,
    data: str | None = None,
    output: Path | None = None,
    cache: bool = True,
    resume: bool = False,
    overwrite: bool = False,
    on_tokenize: Progress | None = None,
) -> tuple[PruneConfig, TargetRecord | None]:
    """Turn ``target_params``, ``target_memory`` or ``target_latency`` into ratios.

    Args:
        model: Hugging Face folder or hub name. For a size only the config is read.
        options: How the model will be pruned. They are returned as they are if ratios decide.
        data: What groups are scored with; only needed for a latency.
        output: The run folder to be, if there is one. Nothing is written.
        cache: Keep the tokens of ``data``, and use those of an earlier run.
        resume: Read from ``output`` what was chosen when the run began.
        overwrite: Whether a run in ``output`` may be replaced.
        on_tokenize: Is told (examples tokenized, all examples).

    Returns:
        The options with ratios in place of the budget, and the record for ``target.json``.

    Raises:
        LpdeployError: The model is small or fast enough already, or cannot become so; or a
            latency cannot be measured here.
        ValueError: ``data`` is missing for a latency, or ``output`` for ``resume``.
    """
    if options.budget is None:
        return options, None
    if resume:
        record = load_target(_require(output, "output"), describe_asked(options))
    elif options.target_latency is None:
        record = _choose_ratio(model, options)
    else:
        _refuse_ranks()
        record = choose_widths(
            model,
            options,
            data=_require(data, "data"),
            output=output,
            cache=cache,
            overwrite=overwrite,
            on_tokenize=on_tokenize,
        )
    chosen = " ".join(f"`{name}={ratio:g}`" for name, ratio in record.ratios.items())
    when = "as chosen when the run began" if resume else "chosen for the target"
    logger.info("%s: %s", when, chosen)
    return options.with_ratios(**record.ratios), record


def _require(value: _Value | None, name: str) -> _Value:
    if value is None:
        raise ValueError(f"`{name}` is needed to resolve this target; give it.")
    return value


def _choose_ratio(model: str, options: PruneConfig) -> TargetRecord:
    """Find the smallest ratio whose rounded shape has at most so many parameters or bytes."""
    config = find_config(model)
    itemsize = 1 if options.target_memory is None else get_itemsize(config)
    limit = options.target_params or options.target_memory or 0
    count = build_counter(config, options.widths)
    before, least = itemsize * count(0), itemsize * count(1 - 1 / _STEPS)
    _refuse_unreachable(model, options, limit=limit, before=before, least=least)
    step = bisect.bisect_left(range(_STEPS), -limit, key=lambda s: -itemsize * count(s / _STEPS))
    ratio = step / _STEPS
    return TargetRecord(
        asked=describe_asked(options),
        ratios={"ratio": ratio},
        found=SizeFound(before, itemsize * count(ratio)),
    )


def _refuse_unreachable(
    model: str, options: PruneConfig, *, limit: int, before: int, least: int
) -> None:
    def write(size: int) -> str:
        if options.target_memory is not None:
            return f"{format_bytes(size)} ({size:,} bytes)"
        return f"{size:,} parameters"

    if before <= limit:
        raise LpdeployError(
            f"`{options.budget}` of {write(limit)}: '{model}' has {write(before)} already. Give "
            "less, or prune to a `ratio`."
        )
    if least > limit:
        raise LpdeployError(
            f"`{options.budget}` of {write(limit)} is out of reach: embeddings, head, norms, "
            "protected layers and the fewest groups that every layer keeps are "
            f"{write(least)} of '{model}'. Give at least that."
        )


def _refuse_ranks() -> None:
    if count_ranks() > 1:
        raise LpdeployError(
            "`target_latency` is measured by one process, and a launcher started several. Start "
            "the command once without the launcher, stop it when it has told the ratios, and give "
            "those to the launcher."
        )
