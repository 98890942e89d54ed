"""A target of size in place of a ratio: the smallest ratio that meets it, and its record."""

import bisect
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from lpdeploy.artifacts import format_bytes, load_json
from lpdeploy.errors import ArtifactError, LpdeployError
from lpdeploy.families.groups import count_group_parameters
from lpdeploy.models.loading import find_config
from lpdeploy.models.shapes import count_parameters
from lpdeploy.plan import GroupSpec
from lpdeploy.pruning.options import PruneOptions
from lpdeploy.pruning.selection import round_kept
from lpdeploy.pruning.setup import list_prunable
from lpdeploy.run_folder import RunFolder

# Ratios are told to a millionth: less than half a group of any layer that there is.
_STEPS = 1_000_000


def choose_ratio(
    model: str,
    options: PruneOptions,
    *,
    parameters: int | None = None,
    bytes: int | None = None,  # noqa: A002 - what is asked for, by the name that the record has
) -> dict[str, Any]:
    """Find the smallest ratio whose rounded shape has at most so many parameters or bytes.

    Args:
        model: Folder or hub name, of which only the config is read.
        options: How it is pruned; their ratio does not count.
        parameters: The most that may be left, embeddings, head and norms included.
        bytes: The most that the weights of the compacted checkpoint may take, in the precision of
            the base's.

    Returns:
        The record: ``asked``, ``ratios`` (``{"ratio": ...}``), and ``before`` and ``after`` in
        parameters or bytes.

    Raises:
        LpdeployError: The model is as small already, or cannot become so.
        ValueError: Not exactly one of the two is given.
    """
    if (parameters is None) == (bytes is None):
        raise ValueError("give either parameters or bytes")
    config = find_config(model)
    itemsize = 1
    if bytes is not None:
        itemsize = config.dtype.itemsize if config.dtype is not None else 4
    limit = bytes if parameters is None else parameters
    assert limit is not None
    count = build_counter(config, options)
    before, least = itemsize * count(0), itemsize * count(1 - 1 / _STEPS)
    _refuse_unreachable(model, limit, before=before, least=least, is_bytes=bytes is not None)
    step = bisect.bisect_left(range(_STEPS), -limit, key=lambda s: -itemsize * count(s / _STEPS))
    ratio = step / _STEPS
    return {
        "asked": {"parameters": limit} if bytes is None else {"bytes": limit},
        "ratios": {"ratio": ratio},
        "before": before,
        "after": itemsize * count(ratio),
    }


def _refuse_unreachable(model: str, limit: int, *, before: int, least: int, is_bytes: bool) -> None:
    name = "--target-memory" if is_bytes else "--target-params"

    def write(size: int) -> str:
        return f"{format_bytes(size)} ({size:,} bytes)" if is_bytes else f"{size:,} parameters"

    if before <= limit:
        raise LpdeployError(
            f"{name} of {write(limit)}: '{model}' has {write(before)} already. Give less, or prune "
            "to a --ratio."
        )
    if least > limit:
        raise LpdeployError(
            f"{name} of {write(limit)} is out of reach: embeddings, head, norms, protected layers "
            f"and the fewest groups that every layer keeps are {write(least)} of '{model}'. Give "
            "at least that."
        )


def build_counter(config: Any, options: PruneOptions) -> Callable[[float], int]:
    """Return what counts the parameters that a ratio leaves.

    With ``scope`` ``global`` scores decide where groups go, and how many may differ by less than a
    rounding step; the most that may be left is counted.

    Raises:
        LpdeployError: No layer may be pruned.
    """
    dense = count_parameters(config)
    families = {
        kind: [spec for spec in list_prunable(config, options) if spec.kind == kind]
        for kind in options.multiples
    }

    def count(ratio: float) -> int:
        ratios = replace(options, ratio=ratio).ratios
        removed = 0
        for kind, specs in families.items():
            kept = _count_kept(specs, ratios[kind], options.multiples[kind], scope=options.scope)
            total = sum(spec.num_groups for spec in specs)
            removed += (total - kept) * count_group_parameters(specs[0], config)
        return dense - removed

    return count


def _count_kept(specs: list[GroupSpec], ratio: float, multiple: int, *, scope: str) -> int:
    """Count the groups of one kind that stay in all layers, at most."""
    if scope == "layer":
        return sum(round_kept(spec.num_groups, ratio, multiple=multiple) for spec in specs)
    total = sum(spec.num_groups for spec in specs)
    # What leaves in chunks ends on the count exactly, unless a layer's first chunk is smaller.
    uneven = any(spec.num_groups % multiple for spec in specs)
    wanted = round_kept(total, ratio, multiple=multiple) + (multiple - 1 if uneven else 0)
    fewest = sum(min(multiple, spec.num_groups) for spec in specs)
    return min(total, max(wanted, fewest))


def load_chosen(run: str | os.PathLike[str], asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return how the ratios of a run were chosen when it began, so that nothing is done again.

    Raises:
        ArtifactError: It began without a target, or with another one.
    """
    fix = "It began with --ratio: resume it with the same."
    chosen = load_json(RunFolder(run).target, fix=fix)
    if chosen["asked"] != dict(asked):
        raise ArtifactError(
            f"The run in '{run}' began with another target: {_write(chosen['asked'])}, not "
            f"{_write(asked)}. Give the same, or --overwrite to start anew."
        )
    return chosen


def _write(asked: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in asked.items())
