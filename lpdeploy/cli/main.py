"""The `lpdeploy` group: commands in pipeline order, and errors as one sentence."""

import importlib
import signal
import threading
import time
from typing import Any

import click

from lpdeploy import __version__
from lpdeploy.cli.common import CONTEXT_SETTINGS, DEBUG, is_first_rank, show_log, write_flags
from lpdeploy.environment import quieten_libraries
from lpdeploy.errors import LpdeployError, OtherRankError, RankLostError, RecipeError

# Pipeline order, which is also the order of `lpdeploy --help`.
_COMMANDS = (
    *("check", "prune", "compact", "export", "package", "verify", "bench", "eval", "paper"),
    *("report", "push", "doctor", "demo"),
)
_FIRST_RANK_SECONDS = 5.0


class _LazyGroup(click.Group):
    """Imports the module of a command when the command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        return importlib.import_module(f"lpdeploy.cli.{cmd_name}").command

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command, and turn the errors of users into one line and exit code 1 or 2."""
        quieten_libraries()
        _end_as_interrupted()
        try:
            with show_log():
                return super().invoke(ctx)
        except OtherRankError:
            ctx.exit(1)
        except RecipeError as error:
            _let_first_rank_speak()
            raise click.UsageError(write_flags(str(error))) from error
        except click.ClickException:
            _let_first_rank_speak()
            raise
        except (LpdeployError, OSError) as error:
            if ctx.meta.get(DEBUG):
                raise
            if not isinstance(error, RankLostError):
                _let_first_rank_speak()
            raise click.ClickException(write_flags(str(error))) from error


def _let_first_rank_speak() -> None:
    """Wait on ranks other than the first, which may be failing in the same way.

    The first rank prints the error, and the launcher then ends the others silently. A rank that is
    still running after a while has failed alone, and prints its own error.
    """
    if not is_first_rank():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_FIRST_RANK_SECONDS)


def _end_as_interrupted() -> None:
    # SIGTERM ends a command as Ctrl-C does: its processes stop, and its scratch files are removed.
    if threading.current_thread() is not threading.main_thread():
        return
    if is_first_rank():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    else:  # in silence
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@click.group(cls=_LazyGroup, context_settings=CONTEXT_SETTINGS)
@click.version_option(__version__, prog_name="lpdeploy")
def main() -> None:
    """Make a LLaMA-family model smaller, and deploy it.

    lpdeploy prunes attention heads and FFN channels while it fine-tunes with LoRA, merges LoRA into
    a dense model, exports it, and verifies that every stage computes the same logits.
    """
