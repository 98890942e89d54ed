"""What commands share: types, options such as --json and --recipe, and the printing of results."""

import logging
import os
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from lpdeploy.cli.types import COUNT, SOURCE, ListOf, NameChoice
from lpdeploy.engines import ENGINES, list_exporting
from lpdeploy.environment import trust_remote_code
from lpdeploy.errors import RecipeError
from lpdeploy.fields import RENAMED
from lpdeploy.recipe import load_recipe
from lpdeploy.records import format_json

CONTEXT_SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "show_default": True}
DEBUG = "lpdeploy.debug"
HAS_RESULT = "lpdeploy.result"
"""Set when a command has printed its JSON, such as a verify that differs; no error follows it."""
# A field in a sentence of the library, with or without a value.
_FIELD = re.compile(r"`(?P<name>[a-z][a-z0-9_]*)(?:=(?P<value>[^`]+))?`")
_ARGUMENTS = ("model", "run")

_Function = TypeVar("_Function", bound=Callable[..., Any])


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


def _list_packed_precisions() -> list[str]:
    from lpdeploy.servers.gguf_types import list_precisions

    return list(dict.fromkeys([*PRECISION.choices, "fp8", *list_precisions()]))


PACKED_PRECISION = NameChoice(_list_packed_precisions)

overwrite_option = click.option("--overwrite", is_flag=True, help="Replace an existing result.")
base_option = click.option(
    "--base",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Where the base model of RUN lies now, if it was moved.",
)
perplexity_option = click.option(
    "--perplexity",
    multiple=True,
    type=SOURCE,
    metavar="SOURCE",
    help="Measure perplexity on this file, folder or hub name (wikitext2, ptb). May be repeated.",
)
task_data_option = click.option(
    "--task-data",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Read the tasks from DIRECTORY/NAME.jsonl instead of the hub.",
)
max_segments_option = click.option(
    "--max-segments", type=COUNT, help="Use at most this many segments of each text."
)
limit_option = click.option("--limit", type=COUNT, help="Use at most this many documents per task.")


def shared_options(*, recipe: bool = True) -> Callable[[_Function], _Function]:
    """Add the options of all commands; --recipe only if it has other options to read."""

    def decorate(function: _Function) -> _Function:
        function = _debug_option(function)
        function = _trust_option(_recipe_option(function) if recipe else function)
        return _json_option(function)

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
    from lpdeploy.cli.main import main

    params = {p.name: p for p in ctx.command.params if p.name and p is not own}
    params.pop("trust_remote_code", None)
    options = load_recipe(
        value,
        _name_command(ctx),
        known=params,
        commands=_list_commands(click.Context(main)),
        former={old: new for old, new in RENAMED.items() if new in params},
    )
    # What a command needs is still asked for if the recipe says null.
    typed = {
        name: _as_typed(params[name], item)
        for name, item in options.items()
        if item is not None or not params[name].required
    }
    ctx.default_map = {**(ctx.default_map or {}), **typed}


def _name_command(ctx: click.Context) -> str:
    # Not from ctx.command_path: it begins with how lpdeploy was started, which may be many words.
    names = []
    while ctx.parent is not None:
        names.append(ctx.info_name or "")
        ctx = ctx.parent
    return " ".join(reversed(names))


def _list_commands(ctx: click.Context) -> list[str]:
    """List the commands below a context; those of a group with its name before theirs."""
    group = ctx.command
    if not isinstance(group, click.Group):
        return []
    names = []
    for name in group.list_commands(ctx):
        inner = click.Context(group.get_command(ctx, name) or click.Command(name))
        names += [f"{name} {below}" for below in _list_commands(inner)] or [name]
    return names


def _as_typed(param: click.Parameter, value: Any) -> Any:
    """Turn a value of a recipe into what a user would type, so that click checks it as strictly.

    Of a number, click would otherwise take the whole part for an option that counts.
    """
    if value is None or (isinstance(value, bool) and getattr(param, "is_flag", False)):
        return value
    if isinstance(value, list) and not param.multiple and not isinstance(param.type, ListOf):
        raise RecipeError(f"The recipe gives `{param.name}` a list. Give one value.")
    typed = [_write_value(item) for item in (value if isinstance(value, list) else [value])]
    return typed if param.multiple or isinstance(value, list) else typed[0]


def _write_value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


_json_option = click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print the result, or the error, as one JSON document to stdout, and nothing else there.",
)
_recipe_option = click.option(
    "--recipe",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    expose_value=False,
    is_eager=True,
    callback=_apply_recipe,
    help="Read options from this YAML file. Options on the command line override it.",
)
_trust_option = click.option(
    "--trust-remote-code",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_trust_remote_code,
    help="Run Python code that comes with the tokenizer. It can do whatever you can.",
)
_debug_option = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_set_debug,
    help="Show the full traceback if the command fails.",
)


def is_first_rank() -> bool:
    """Return whether this process prints: it is the only one, or rank 0 of a launcher."""
    return os.environ.get("RANK", "0") == "0"


def print_result(data: dict[str, Any], text: str, *, as_json: bool) -> None:
    """Print a result to stdout: as text or, with --json, as JSON, with the text on stderr."""
    if not is_first_rank():
        return
    if text:
        click.echo(text, err=as_json)
    if as_json:
        click.get_current_context().meta[HAS_RESULT] = True
        click.echo(format_json(data, indent=None), nl=False)


def print_error(kind: str, message: str) -> None:
    """Print why a command with --json failed to stdout, as one JSON document."""
    if is_first_rank():
        error = {"type": kind, "message": message}
        click.echo(format_json({"error": error}, indent=None), nl=False)


def log(message: str) -> None:
    """Print a message to stderr, so that stdout holds only the result."""
    if is_first_rank():
        click.echo(write_flags(message), err=True)


def check_models(*models: str, unmerged: bool = False) -> None:
    """Check that models and runs are there, before anything heavy is imported.

    Raises:
        ArtifactError: As ``locate_model``.
    """
    from lpdeploy.models.place import locate_model

    for model in models:
        locate_model(model, unmerged=unmerged)


def say_next(*words: str | os.PathLike[str]) -> None:
    """Name the command that usually follows, as it can be pasted into a shell.

    A program that reads --json knows what it does next.
    """
    if not click.get_current_context().params.get("as_json"):
        log(f"Next: lpdeploy {shlex.join(os.fspath(word) for word in words)}")


class _TerminalHandler(logging.Handler):
    """Prints what the library logs, with its fields written as options."""

    def emit(self, record: logging.LogRecord) -> None:
        """Show one message."""
        log(record.getMessage())


@contextmanager
def show_log() -> Iterator[None]:
    """Show on stderr what the library logs while a command runs."""
    logger = logging.getLogger("lpdeploy")
    handler, level, passes_on = _TerminalHandler(), logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    # Some libraries give the root logger a handler, which would print each line once more.
    logger.propagate = False
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.propagate = passes_on
        logger.removeHandler(handler)


def write_flags(sentence: str) -> str:
    """Turn the fields in a sentence of the library into options of the command line.

    `` `micro_batch_size` `` becomes ``--micro-batch-size``, `` `removal='mask'` `` becomes
    ``--removal mask``, and `` `shard=True` `` becomes ``--shard``.
    """
    return _FIELD.sub(_write_flag, sentence)


def _write_flag(match: re.Match[str]) -> str:
    name, value = match["name"], match["value"]
    if name in _ARGUMENTS:
        return name.upper()
    flag = f"--{name.replace('_', '-')}"
    return flag if value in (None, "True") else f"{flag} {value.strip(chr(39))}"
