"""The `lpdeploy` group: commands in pipeline order, and errors as one sentence."""

import difflib
import importlib
from typing import Any

import click

from lpdeploy import __version__
from lpdeploy.cli.common import (
    CONTEXT_SETTINGS,
    DEBUG,
    HAS_RESULT,
    log,
    print_error,
    show_log,
    write_flags,
)
from lpdeploy.cli.signals import interrupt_on_sigterm, let_first_rank_speak
from lpdeploy.environment import quieten_libraries
from lpdeploy.errors import (
    INTERRUPTED,
    LpdeployError,
    OptionError,
    OtherRankError,
    RankLostError,
    RecipeError,
    RunEndedError,
    describe_os_error,
)

# Pipeline order, which is also the order of `lpdeploy --help`.
_COMMANDS = (
    *("check", "prune", "compact", "export", "package", "verify", "bench", "eval", "paper"),
    *("generate", "chat", "serve", "report", "compare", "sweep", "push", "doctor", "demo"),
)

_INTERRUPTED = "The command was interrupted."


class _RunEnded(click.ClickException):
    exit_code = INTERRUPTED


class _LazyGroup(click.Group):
    """Imports the module of a command when the command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        return importlib.import_module(f"lpdeploy.cli.{cmd_name}").command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command, or suggest the nearest name."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            near = difflib.get_close_matches(args[0], _COMMANDS, n=1)
            if not near:
                raise
            text = f"{error.message} Did you mean '{near[0]}'?"
            raise click.UsageError(text, ctx=error.ctx) from error

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command, and turn the errors of users into one line and exit code 1 or 2."""
        quieten_libraries()
        interrupt_on_sigterm()
        as_json = "--json" in ctx.args  # asked for even where the options cannot be parsed
        try:
            with show_log():
                return super().invoke(ctx)
        except OtherRankError:
            ctx.exit(1)
        except (click.Abort, KeyboardInterrupt):
            if as_json and HAS_RESULT not in ctx.meta:
                print_error("Interrupted", _INTERRUPTED)
            log(f"\n{_INTERRUPTED}")  # below a ^C or a half-written line
            ctx.exit(INTERRUPTED)
        except BrokenPipeError:  # of `| head`, which needs no word: click ends in silence
            raise
        except (click.ClickException, LpdeployError, OSError) as error:
            if ctx.meta.get(DEBUG) and not isinstance(error, click.ClickException | RecipeError):
                raise
            if not isinstance(error, RankLostError):
                let_first_rank_speak()
            explained = _explain(error)
            if as_json and HAS_RESULT not in ctx.meta:
                wrong_usage = isinstance(explained, click.UsageError)
                kind = "UsageError" if wrong_usage else type(error).__name__
                print_error(kind, explained.format_message())
            raise explained from error


def _explain(error: Exception) -> click.ClickException:
    """Turn an error into what click prints as one sentence."""
    if isinstance(error, click.ClickException):
        return error
    if isinstance(error, OSError):
        return click.ClickException(describe_os_error(error))
    kind = click.ClickException
    if isinstance(error, RecipeError | OptionError):
        kind = click.UsageError
    elif isinstance(error, RunEndedError):
        kind = _RunEnded
    return kind(write_flags(str(error)))


@click.group(cls=_LazyGroup, context_settings=CONTEXT_SETTINGS)
@click.version_option(__version__, prog_name="lpdeploy")
def main() -> None:
    """Make a LLaMA-family model smaller, and deploy it.

    lpdeploy prunes attention heads and FFN channels while it fine-tunes with LoRA, merges LoRA into
    a dense model, exports it, and verifies that every stage computes the same logits.
    """
