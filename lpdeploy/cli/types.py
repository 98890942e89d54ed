"""Types of arguments and options, beside those of click."""

import math
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from lpdeploy.fields import MAX_COUNT


class PathOrName(click.types.StringParamType):
    """A path or a name on the hub, as the library takes it; shells complete it as a path."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def shell_complete(
        self,
        ctx: click.Context,  # noqa: ARG002 - click's signature
        param: click.Parameter,  # noqa: ARG002
        incomplete: str,
    ) -> list[CompletionItem]:
        """Leave it to the shell to list ``file`` (which includes folders) or ``dir``."""
        return [CompletionItem(incomplete, type=self._kind)]


MODEL = PathOrName("dir")
SOURCE = PathOrName("file")
RUN = click.Path(path_type=Path, file_okay=False, exists=True)
FOLDER = click.Path(path_type=Path, file_okay=False)


class Count(click.ParamType):
    """A whole number with bounds, which the help does not list: they only stop slips."""

    name = "integer"

    def __init__(self, low: int = 1, high: int = MAX_COUNT) -> None:
        self._low, self._high = low, high

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Convert to an int, and check the bounds."""
        number = click.INT.convert(value, param, ctx)
        if not self._low <= number <= self._high:
            self.fail(
                f"{number} is not in the range from {self._low:,} to {self._high:,}.", param, ctx
            )
        return number


COUNT = Count()


class Number(click.FloatRange):
    """A finite number within bounds."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Convert to a float, and check the bounds, which NaN is within for click."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


class NameChoice(click.Choice[str]):
    """A choice of names that are read when they are needed, so that a table of them may grow."""

    def __init__(self, read: Callable[[], Iterable[str]]) -> None:
        super().__init__(())
        self._read = read

    @property
    def choices(self) -> tuple[str, ...]:
        """The names that are allowed now."""
        return tuple(self._read())

    @choices.setter
    def choices(self, _: object) -> None:
        """Ignore the value: the names come from ``read``."""


class NumberOrWord(click.ParamType):
    """A number, or one of a few words."""

    name = "float"

    def __init__(self, number: click.ParamType, words: Collection[str]) -> None:
        self._number, self._words = number, words

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float | str:
        """Take a word as it is, and anything else as a number."""
        if value in self._words:
            return value
        if not _is_number(value):
            self.fail(f"{value!r} is neither a number nor {' or '.join(self._words)}.", param, ctx)
        return self._number.convert(value, param, ctx)


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


class ListOf(click.ParamType):
    """One or more values, separated by commas on the command line; a recipe may have a list."""

    name = "list"

    def __init__(self, kind: click.ParamType = click.STRING) -> None:
        self._kind = kind

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        """Return the values, each converted by the type of the list."""
        parts = value if isinstance(value, list | tuple) else str(value).split(",")
        given = [text for text in (str(part).strip() for part in parts) if text]
        if not given:
            self.fail(f"{value!r} is empty. Give values, separated by commas", param, ctx)
        return tuple(self._kind.convert(text, param, ctx) for text in given)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Complete the last value, and leave those before it as they are."""
        before, comma, last = incomplete.rpartition(",")
        found = self._kind.shell_complete(ctx, param, last)
        return [CompletionItem(f"{before}{comma}{item.value}") for item in found]
