"""What may stand in place of --ratio: a size or a latency, with units, and how it is chosen."""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from decimal import Decimal
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from lpdeploy.cli.common import ENGINE, log
from lpdeploy.errors import LpdeployError
from lpdeploy.pruning.options import PruneOptions

_Function = TypeVar("_Function", bound=Callable[..., Any])

_TARGETS = ("target_params", "target_memory", "target_latency")
_LATENCY = ("engine", "latency_phase", "latency_tokens")
_OWN_RATIOS = ("head_ratio", "channel_ratio")


class Quantity(click.ParamType):
    """A number with a unit; some are counted without one, too."""

    def __init__(self, name: str, units: Mapping[str, int | Decimal], example: str) -> None:
        self.name = name
        self._units = {unit: Decimal(factor) for unit, factor in units.items()}
        self._example = example

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Decimal:
        """Return the number of the unit whose factor is 1."""
        if isinstance(value, Decimal):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(value).strip())
        if match is None or match[2] not in self._units:
            units = ", ".join(unit for unit in self._units if unit)
            alone = ", or none" if "" in self._units else ""
            self.fail(
                f"{value!r} is no {self.name}: give a number with one of the units {units}{alone}, "
                f"such as {self._example}.",
                param,
                ctx,
            )
        return Decimal(match[1]) * self._units[match[2]]


PARAMETERS = Quantity(
    "number of parameters", {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}, "3.5B"
)
BYTES = Quantity(
    "size",
    {
        "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
        "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40,
    },
    "7GiB",
)  # fmt: skip
MILLISECONDS = Quantity("time", {"us": Decimal("0.001"), "ms": 1, "s": 1000}, "30ms")


def target_options(function: _Function) -> _Function:
    """Add to prune what may stand in place of --ratio."""
    for option in reversed(
        (
            click.option(
                "--target-params",
                type=PARAMETERS,
                metavar="COUNT",
                help="In place of --ratio: the most parameters that may be left, such as 3.5B.",
            ),
            click.option(
                "--target-memory",
                type=BYTES,
                metavar="SIZE",
                help="In place of --ratio: the most bytes of weights that may be left, in the "
                "checkpoint's own precision, such as 7GiB.",
            ),
            click.option(
                "--target-latency",
                type=MILLISECONDS,
                metavar="TIME",
                help="In place of --ratio: the longest that it may take here on --engine, such as "
                "30ms. Shapes are measured, and heads and channels chosen each for themselves.",
            ),
            click.option("--engine", type=ENGINE, help="What --target-latency measures."),
            click.option(
                "--latency-phase",
                type=click.Choice(["prefill", "decode"]),
                default="prefill",
                help="Of --target-latency: a whole prompt, or a token after it.",
            ),
            click.option(
                "--latency-tokens",
                type=click.IntRange(min=1),
                default=512,
                help="Of the prompt of --target-latency.",
            ),
        )
    ):
        function = option(function)
    return function


def take_target(values: dict[str, Any]) -> dict[str, Any] | None:
    """Take the options of a target out of those of prune; None where there is a ratio.

    What decides the shape on the command line wins over what does in a recipe.

    Raises:
        click.UsageError: More than one is given, or --engine without, or not with, a latency.
    """
    deciding = _find_deciding(values)
    for name in {*_TARGETS, *_OWN_RATIOS} - deciding:
        values[name] = None
    options = {name: values.pop(name) for name in (*_TARGETS, *_LATENCY)}
    given = [name for name in _TARGETS if name in deciding]
    if given and len(deciding) > 1:
        names = " and ".join(_write_flag(name) for name in sorted(deciding))
        raise click.UsageError(f"{names} each decide what is left. Give one of them.")
    if "target_latency" in given and options["engine"] is None:
        raise click.UsageError(
            "--target-latency needs to know what to measure. "
            f"Give --engine {'|'.join(ENGINE.choices)}."
        )
    for name in _LATENCY:
        if "target_latency" not in given and _find_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(
                f"{_write_flag(name)} is about --target-latency. Give that too, or leave it out."
            )
    return _write_asked(given[0], options) if given else None


def _find_deciding(values: Mapping[str, Any]) -> set[str]:
    """Return the options that say what is left; typed ones win over those of a recipe."""
    known = ("ratio", *_OWN_RATIOS, *_TARGETS)
    typed = {name for name in known if _find_source(name) is ParameterSource.COMMANDLINE}
    recipe = {
        name
        for name in known
        if _find_source(name) is ParameterSource.DEFAULT_MAP and values[name] is not None
    }
    if typed - set(_OWN_RATIOS):
        return typed
    return typed | (recipe - set(_TARGETS) if typed else recipe)


def _find_source(name: str) -> ParameterSource | None:
    return click.get_current_context().get_parameter_source(name)


def _write_flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _write_asked(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    match name:
        case "target_params":
            return {"parameters": int(options[name])}
        case "target_memory":
            return {"bytes": int(options[name])}
        case _:
            return {
                "latency_ms": float(options[name]),
                "engine": options["engine"],
                "phase": options["latency_phase"],
                "tokens": options["latency_tokens"],
            }


def choose_ratios(
    asked: Mapping[str, Any], options: PruneOptions, *, resume: bool, **given: Any
) -> tuple[PruneOptions, dict[str, Any]]:
    """Turn a target into ratios; a run that goes on has them already.

    Args:
        asked: What ``take_target`` returned.
        options: How to prune.
        resume: Whether the run is to go on.
        given: Of ``choose_widths``.

    Returns:
        The options with their ratios, and the record of how they were chosen.
    """
    from lpdeploy.pruning.target import choose_ratio, load_chosen

    if resume:
        chosen = load_chosen(given["output"], asked)
    elif "latency_ms" in asked:
        from lpdeploy.benchmark.target import LatencyTarget, choose_widths

        _refuse_ranks()
        target = LatencyTarget(**asked)
        chosen = choose_widths(options=options, target=target, log=log, **given)
    else:
        chosen = choose_ratio(given["model"], options, **asked)
    ratios = " ".join(f"{_write_flag(name)} {ratio:g}" for name, ratio in chosen["ratios"].items())
    log(f"{'as chosen before' if resume else 'for the target'}: {ratios}")
    return replace(options, **chosen["ratios"]), chosen


def _refuse_ranks() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise LpdeployError(
            "--target-latency is measured by one process, and a launcher started several. Start it "
            "once without the launcher, stop it when it has told the ratios, and give those to the "
            "launcher."
        )
