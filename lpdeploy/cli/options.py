"""Command-line options, made from the fields of ``PruneConfig``."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from lpdeploy.cli.common import ENGINE, log, write_flags
from lpdeploy.cli.types import Count, NameChoice, Number, NumberOrWord
from lpdeploy.config import GROUPS, PruneConfig
from lpdeploy.conflicts import BUDGETS, LATENCY, RATIOS
from lpdeploy.fields import RENAMED, get_kind, get_option
from lpdeploy.presets import list_preset

_Function = TypeVar("_Function", bound=Callable[..., Any])

_FIELDS = {own.name: own for own in dataclasses.fields(PruneConfig)}


class Quantity(click.ParamType):
    """A number with a unit, in upper or lower case. The unit may be optional."""

    def __init__(self, name: str, units: Mapping[str, int | Decimal], example: str) -> None:
        self.name = name
        self._units = list(units)
        self._factors = {unit.lower(): Decimal(factor) for unit, factor in units.items()}
        self._example = example

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Decimal:
        """Return the number in the unit whose factor is 1."""
        if isinstance(value, Decimal):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(value).strip())
        if match is None or match[2].lower() not in self._factors:
            units = ", ".join(unit for unit in self._units if unit)
            alone = ", or no unit" if "" in self._units else ""
            self.fail(
                f"{value!r} is not a {self.name}. Give a number with one of the units "
                f"{units}{alone}, such as {self._example}.",
                param,
                ctx,
            )
        return Decimal(match[1]) * self._factors[match[2].lower()]


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

# Fields that users write with a unit, or whose choices the config does not know.
_TYPES: dict[str, click.ParamType] = {
    "target_params": PARAMETERS,
    "target_memory": BYTES,
    "target_latency": MILLISECONDS,
    "engine": ENGINE,
}
_METAVARS = {
    "target_params": "COUNT",
    "target_memory": "SIZE",
    "target_latency": "TIME",
    "lr": "RATE|auto",
}


class GroupedOption(click.Option):
    """An option that is listed under its section, and may have a former name."""

    def __init__(
        self, *names: Any, group: str | None = None, former: str | None = None, **rest: Any
    ) -> None:
        super().__init__(*names, **rest)
        self.group = group
        self._former = former

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        """Accept the former name as well, and remember that it was used."""
        super().add_to_parser(parser, ctx)
        if self._former:
            action, const = ("store_const", True) if self.is_flag else ("store", None)
            flag = write_flags(f"`{self._former}`")
            parser.add_option(self, [flag], dest=self._former, action=action, const=const)

    def consume_value(self, ctx: click.Context, opts: Mapping[str, Any]) -> Any:
        """Return the value of either name, with a warning for the former one."""
        if self._former is None or self._former not in opts:
            return super().consume_value(ctx, opts)
        if self.name in opts:
            raise click.UsageError(
                write_flags(
                    f"`{self._former}` is the former name of `{self.name}`. Give only one."
                ),
                ctx=ctx,
            )
        log(f"`{self._former}` is now called `{self.name}`; the former name still works.")
        return opts[self._former], ParameterSource.COMMANDLINE


class GroupedCommand(click.Command):
    """A command whose help lists its options in sections."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections in order, then the options that belong to none."""
        rows: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                group = getattr(param, "group", None) or "Options"
                rows.setdefault(group, []).append(record)
        for title in (*GROUPS, "Options"):
            if title in rows:
                with formatter.section(title):
                    formatter.write_dl(rows[title])


def config_options(*names: str, **defaults: Any) -> Callable[[_Function], _Function]:
    """Add fields of ``PruneConfig`` to a command as options.

    Args:
        names: Fields to add; all of them if none is named.
        defaults: Defaults of this command that differ from those of the fields.
    """

    def decorate(function: _Function) -> _Function:
        for name in reversed(names or tuple(_FIELDS)):
            function = _make_option(name, defaults)(function)
        return function

    return decorate


def _make_option(name: str, defaults: Mapping[str, Any]) -> Callable[[_Function], _Function]:
    own = _FIELDS[name]
    rules = get_option(own)
    default = defaults.get(name, own.default)
    text = rules.help
    if default is None and rules.unset:
        text = f"{text}  [default: {rules.unset}]"
    former = next((old for old, new in RENAMED.items() if new == name), None)
    shared = {"group": rules.group, "former": former, "help": write_flags(text)}
    flag = write_flags(f"`{name}`")
    if get_kind(own) is bool:
        both = f"{flag}/--no-{flag.removeprefix('--')}"
        return click.option(both, cls=GroupedOption, default=default, show_default=False, **shared)
    return click.option(
        flag,
        cls=GroupedOption,
        type=_choose_type(name),
        metavar=_METAVARS.get(name),
        default=default,
        **shared,
    )


def _choose_type(name: str) -> click.ParamType:
    own = _FIELDS[name]
    rules = get_option(own)
    if name in _TYPES:
        return _TYPES[name]
    if rules.choices:
        return NameChoice(lambda: rules.choices)
    if get_kind(own) is int:
        assert rules.low is not None
        assert rules.high is not None
        return Count(int(rules.low), int(rules.high))
    low = rules.low if rules.above is None else rules.above
    high = rules.high if rules.below is None else rules.below
    number = Number(low, high, min_open=rules.above is not None, max_open=rules.below is not None)
    return NumberOrWord(number, rules.words) if rules.words else number


def build_config(values: Mapping[str, Any]) -> PruneConfig:
    """Build a config from the options of a command.

    Raises:
        click.UsageError: A value is wrong, or two contradict each other.
    """
    numbers = {
        name: None if value is None else get_kind(_FIELDS[name])(value)
        for name, value in values.items()
        if name in BUDGETS
    }
    try:
        return PruneConfig(**{**values, **numbers})
    except ValueError as error:
        raise click.UsageError(write_flags(str(error))) from error


def apply_preset(values: dict[str, Any], name: str | None) -> None:
    """Set what a preset says, where neither the command line nor a recipe says something else."""
    if name is not None:
        context = click.get_current_context()
        # What is typed overrides a recipe, a preset as well; one in a recipe gives way to its rest.
        weaker = {ParameterSource.DEFAULT}
        weaker |= {ParameterSource.DEFAULT_MAP} if is_typed("preset") else set()
        chosen = {n for n in values if context.get_parameter_source(n) not in weaker}
        values |= list_preset(name, values, chosen=chosen)


def drop_overruled(values: dict[str, Any]) -> None:
    """Let ratios and budgets on the command line override those of a recipe.

    A typed ``--ratio`` or budget replaces all ratios and budgets of the recipe. A typed head or
    channel ratio replaces only the recipe's budget.
    """
    typed = {name for name in (*RATIOS, *BUDGETS) if is_typed(name)}
    dropped = {*RATIOS, *BUDGETS} - typed if typed & {"ratio", *BUDGETS} else {*BUDGETS}
    for name in dropped if typed else ():
        values[name] = None
    # How many layers go is said by one of these.
    if is_typed("depth"):
        dropped = {"drop_layers", "head_ratio", "channel_ratio"}
    elif any(map(is_typed, ("drop_layers", "head_ratio", "channel_ratio"))):
        dropped = {"depth"}
    else:
        dropped = set()
    if is_typed("heads") and values["heads"] == "auto":
        dropped |= {"head_ratio", "channel_ratio"}
    elif values["heads"] == "auto" and any(map(is_typed, ("head_ratio", "channel_ratio"))):
        dropped |= {"heads"}
    for name in dropped:
        values[name] = values[name] if is_typed(name) else None
    if values["target_latency"] is None:
        for name in LATENCY:
            values[name] = values[name] if is_typed(name) else None


def is_typed(name: str) -> bool:
    """Tell whether an option is on the command line, and not in a recipe."""
    source = click.get_current_context().get_parameter_source(name)
    return source is ParameterSource.COMMANDLINE
