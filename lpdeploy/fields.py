"""Fields of a config that explain and check themselves. Standard library only."""

import math
from collections.abc import Collection, Mapping
from dataclasses import Field, dataclass, field, fields
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, get_args

MAX_COUNT = 10_000_000
"""Largest number of steps, rows, tokens, and other things that a command counts. More is a slip."""

RENAMED = {"warmup": "prune_warmup", "cooldown": "prune_cooldown"}
"""Former name of a field -> its name. Recipes, checkpoints and commands may use either."""

_KEY = "option"
_NOUNS: dict[type, str] = {int: "a whole number", float: "a finite number", str: "a name"}


@dataclass(frozen=True)
class Option:
    """What is allowed in a field, and how it is explained.

    Attributes:
        help: A full phrase that says what the field does. It names other fields in backticks.
        group: Heading under which the command line lists the field.
        choices: Names that are allowed; empty if any value of the type is. A table may grow.
        words: Names that a number's field takes as well.
        low: Least value allowed.
        high: Largest value allowed.
        above: Lower bound that is not allowed itself.
        below: Upper bound that is not allowed itself.
        unset: What None stands for, in words; empty if None needs no explanation.
    """

    help: str
    group: str
    choices: Collection[str] = ()
    words: Collection[str] = ()
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    unset: str = ""


def option(text: str, *, default: Any, **rules: Any) -> Any:
    """Declare a field of a dataclass: its help, its default, and the rest of ``Option``."""
    return field(default=default, metadata={_KEY: Option(text, **rules)})


def get_option(own: Field[Any]) -> Option:
    """Return what ``option`` declared."""
    return own.metadata[_KEY]


def get_kind(own: Field[Any]) -> type:
    """Return ``bool``, ``int``, ``float`` or ``str``, also for a field that may be None."""
    kinds = get_args(own.type) if isinstance(own.type, UnionType) else (own.type,)
    return next(kind for kind in kinds if kind is not NoneType)


def is_optional(own: Field[Any]) -> bool:
    """Tell whether a field may be None."""
    return NoneType in get_args(own.type)


def check_fields(config: Any) -> None:
    """Check type, range, choices and finiteness of every field of a frozen dataclass.

    A number becomes a plain ``int`` or ``float``, whichever the field is declared as.

    Raises:
        ValueError: A value is not allowed; the message names its field in backticks.
    """
    for own in fields(config):
        value = getattr(config, own.name)
        if value is None and is_optional(own):
            continue
        if isinstance(value, str) and value in get_option(own).words:
            continue
        kind = get_kind(own)
        if not (_is_kind(value, kind) and _is_allowed(value, get_option(own))):
            raise ValueError(f"`{own.name}` is {value!r}; it must be {_describe_allowed(own)}.")
        if kind in (int, float):
            object.__setattr__(config, own.name, kind(value))


def _is_kind(value: Any, kind: type) -> bool:
    if isinstance(value, bool) or kind is bool:  # a bool is an int in Python, and a mistake here
        return isinstance(value, bool) and kind is bool
    if kind is float:
        return isinstance(value, Real) and _is_finite(value)
    return isinstance(value, Integral if kind is int else kind)


def _is_finite(value: Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the largest float
        return False


def _is_allowed(value: Any, rules: Option) -> bool:
    if rules.choices:
        return value in rules.choices
    return (
        (rules.low is None or value >= rules.low)
        and (rules.high is None or value <= rules.high)
        and (rules.above is None or value > rules.above)
        and (rules.below is None or value < rules.below)
    )


def _write_bound(bound: float) -> str:
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"


def _describe_allowed(own: Field[Any]) -> str:
    rules, kind = get_option(own), get_kind(own)
    if rules.choices or kind is bool:
        said = f"one of {', '.join(rules.choices)}" if rules.choices else "True or False"
    else:
        bounds = (
            ("of at least", rules.low),
            ("of at most", rules.high),
            ("above", rules.above),
            ("below", rules.below),
        )
        limits = " and ".join(
            f"{words} {_write_bound(bound)}" for words, bound in bounds if bound is not None
        )
        said = ", or ".join([f"{_NOUNS[kind]} {limits}".rstrip(), *rules.words])
    return f"{said}, or None" if is_optional(own) else said


def rename_fields(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Give fields that were recorded under a former name their present one.

    Raises:
        ValueError: A field is given under both names.
    """
    for former, name in RENAMED.items():
        if former in values and name in values:
            raise ValueError(f"`{former}` is the former name of `{name}`; give one of them.")
    return {RENAMED.get(name, name): value for name, value in values.items()}
