"""What all commands share: --json, --recipe, --debug, and the printing of results."""

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from lpdeploy.config import RENAMED
from lpdeploy.engines import ENGINES, list_exporting
from lpdeploy.environment import trust_remote_code
from lpdeploy.recipe import load_recipe

CONTEXT_SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "show_default": True}
DEBUG = "lpdeploy.debug"
DEVICE_HELP = "Device to run on. auto is cuda if torch finds a GPU, else cpu."
# A field of the library in one of its sentences, with a value or without.
_FIELD = re.compile(r"`(?P<name>[a-z][a-z0-9_]*)(?:=(?P<value>[^`]+))?`")
_ARGUMENTS = ("model", "run")

_Function = TypeVar("_Function", bound=Callable[..., Any])


RUN = click.Path(path_type=Path, file_okay=False, exists=True)
FOLDER = click.Path(path_type=Path, file_okay=False)


class NameChoice(click.Choice[str]):
    """A choice of names that is read late, so that names added at run time are known."""

    def __init__(self, read: Callable[[], Iterable[str]]) -> None:
        super().__init__(())
        self._read = read

    @property
    def choices(self) -> tuple[str, ...]:
        """The names that are valid now."""
        return tuple(self._read())

    @choices.setter
    def choices(self, _: object) -> None:
        """Ignore the value: the names come from ``read``."""


def _list_targets() -> list[str]:
    from lpdeploy.servers.verdicts import list_targets

    return list_targets()


TARGET = NameChoice(_list_targets)
ENGINE = NameChoice(lambda: ENGINES)
EXPORTED = NameChoice(lambda: (engine.name for engine in list_exporting()))
SERVED = NameChoice(lambda: (engine.name for engine in list_exporting() if engine.triton))
PRECISION = NameChoice(
    lambda: dict.fromkeys(name for engine in list_exporting() for name in engine.precisions)
)


def shared_options(*, recipe: bool = True) -> Callable[[_Function], _Function]:
    """Add --json and --debug to a command, and --recipe unless it has no options to keep."""

    def decorate(function: _Function) -> _Function:
        function = click.option(
            "--debug",
            is_flag=True,
            expose_value=False,
            is_eager=True,
            callback=_set_debug,
            help="Show the full traceback if the command fails.",
        )(function)
        if recipe:
            function = click.option(
                "--recipe",
                type=click.Path(path_type=Path, dir_okay=False, exists=True),
                expose_value=False,
                is_eager=True,
                callback=_apply_recipe,
                help="Read options from this YAML file. Options on the command line override it.",
            )(function)
        function = click.option(
            "--trust-remote-code",
            is_flag=True,
            expose_value=False,
            is_eager=True,
            callback=_trust_remote_code,
            help="Run Python code that comes with the tokenizer. It can do whatever you can.",
        )(function)
        return click.option(
            "--json",
            "as_json",
            is_flag=True,
            help="Print the result as one JSON document on the last line of stdout.",
        )(function)

    return decorate


def _trust_remote_code(ctx: click.Context, _: click.Parameter, value: bool) -> None:  # noqa: FBT001
    if value:
        ctx.with_resource(trust_remote_code())


def _set_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:  # noqa: FBT001
    ctx.meta[DEBUG] = value
    if value:
        logging.getLogger("lm_eval").setLevel(logging.WARNING)


def _apply_recipe(ctx: click.Context, own: click.Parameter, value: Path | None) -> None:
    if value is None:
        return
    # A recipe may be a stranger's: only the command line says whom to trust.
    params = [p.name for p in ctx.command.params if p.name and p is not own]
    known = [name for name in params if name != "trust_remote_code"]
    command = " ".join(ctx.command_path.split()[1:])
    former = {old: new for old, new in RENAMED.items() if new in known}
    options = load_recipe(value, command, known=known, former=former)
    ctx.default_map = {**(ctx.default_map or {}), **options}


def split_names(value: Any) -> tuple[str, ...]:
    """Split an option's value at commas; a recipe may give a list."""
    parts = value if isinstance(value, list | tuple) else str(value or "").split(",")
    return tuple(str(part).strip() for part in parts if str(part).strip())


def is_first_rank() -> bool:
    """Return whether this is the process that prints: the only one, or rank 0 of a launcher."""
    return os.environ.get("RANK", "0") == "0"


def print_result(data: dict[str, Any], text: str, *, as_json: bool) -> None:
    """Print a result to stdout: as text, then, with --json, as JSON on the last line."""
    if not is_first_rank():
        return
    click.echo(text)
    if as_json:
        click.echo(json.dumps(data))


def log(message: str) -> None:
    """Print a message to stderr, so that stdout holds only the result."""
    if is_first_rank():
        click.echo(write_flags(message), err=True)


class _TerminalHandler(logging.Handler):
    """Passes what the library logs on to the terminal, in the words of the command line."""

    def emit(self, record: logging.LogRecord) -> None:
        """Show one message."""
        log(record.getMessage())


@contextmanager
def show_log() -> Iterator[None]:
    """Show on stderr what the library logs while a command runs."""
    logger = logging.getLogger("lpdeploy")
    handler, level = _TerminalHandler(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def write_flags(sentence: str) -> str:
    """Turn the fields that the library speaks of into options of the command line.

    The library writes `` `micro_batch_size` `` or `` `removal='mask'` ``; here they become
    ``--micro-batch-size`` and ``--removal mask``. A flag that is on becomes the option alone.
    """
    return _FIELD.sub(_write_flag, sentence)


def _write_flag(match: re.Match[str]) -> str:
    name, value = match["name"], match["value"]
    if name in _ARGUMENTS:
        return name.upper()
    flag = f"--{name.replace('_', '-')}"
    return flag if value in (None, "True") else f"{flag} {value.strip(chr(39))}"
