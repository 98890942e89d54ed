"""`lpdeploy chat`: a conversation with a model in the terminal."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from lpdeploy.cli.common import ENGINE, check_models, log, print_result, shared_options
from lpdeploy.cli.options import config_options
from lpdeploy.cli.sampling import build_generate_options, sampling_options
from lpdeploy.cli.types import MODEL
from lpdeploy.errors import LpdeployError
from lpdeploy.plan import CHAT_TEMPLATE, PROMPT_FORMATS

if TYPE_CHECKING:
    from lpdeploy.generation.chat import Conversation

_CLEAR, _EXIT = "/clear", "/exit"


@click.command("chat")
@click.argument("model", type=MODEL, metavar="RUN|MODEL")
@click.option(
    "--prompt-format",
    type=click.Choice(PROMPT_FORMATS),
    default=CHAT_TEMPLATE,
    help="Write turns with the model's own template, or under fixed headings (instruction).",
)
@sampling_options(seed=None)
@click.option("--engine", type=ENGINE, default="torch", help="Engine that runs the model.")
@config_options("device")
@shared_options()
def command(
    *, model: str, prompt_format: str, engine: str, device: str, as_json: bool, **values: Any
) -> None:
    """Talk to a RUN or MODEL in the terminal.

    A RUN must be compacted first. /clear begins a new conversation, and /exit or Ctrl-D ends it. If
    a conversation no longer fits, its oldest turns are forgotten. Lines may also come from a pipe.
    With --json, answers are shown on stderr, and all turns are printed at the end.
    """
    options = build_generate_options(values, prompt_format=prompt_format)
    check_models(model)

    from lpdeploy.engines import get_engine
    from lpdeploy.generation.chat import Conversation, check_chat
    from lpdeploy.generation.writer import load_writer
    from lpdeploy.models.loading import resolve_device
    from lpdeploy.models.place import locate_model

    device = resolve_device(device)
    get_engine(engine).check(device)
    place = locate_model(model)
    with place.hold(shared=True):
        writer = load_writer(place, engine, device=device)
    check_chat(writer, options)
    turns: list[dict[str, str]] = []
    try:
        refused = _talk(Conversation(writer, options), turns, on_stderr=as_json)
    finally:  # what was said is not lost, however it ends
        if as_json:
            print_result({"model": model, "engine": engine, "messages": turns}, "", as_json=True)
    if refused:
        click.get_current_context().exit(1)


def _talk(conversation: Conversation, turns: list[dict[str, str]], *, on_stderr: bool) -> int:
    """Answer all lines, add what is said to ``turns``, and count what could not be answered."""
    refused = 0
    for line in _read_lines():
        if line == _CLEAR:
            conversation.clear()
            continue
        try:
            _answer(conversation, line, on_stderr=on_stderr)
        except LpdeployError as error:
            refused += 1
            log(f"Error: {error}")
        else:
            turns += [asdict(message) for message in conversation.messages[-2:]]
    return refused


def _read_lines() -> Any:
    """Yield what is typed, or comes from a pipe, until it ends."""
    stream = sys.stdin
    if stream.isatty():
        import readline  # noqa: F401 - lets input() edit a line, and remembers earlier ones

        log(f"Type a message. {_CLEAR} begins a new conversation, {_EXIT} or Ctrl-D ends it.")
        lines = iter(_read_typed, None)
    else:
        lines = (line.removesuffix("\n") for line in stream)
    for line in lines:
        if line.strip() == _EXIT:
            return
        if line.strip():
            yield line.strip()


def _read_typed() -> str | None:
    try:
        return input("> ")
    except EOFError:
        click.echo()
        return None


def _answer(conversation: Conversation, line: str, *, on_stderr: bool) -> None:
    before = conversation.num_forgotten
    answer = conversation.ask(line, on_text=lambda text: click.echo(text, nl=False, err=on_stderr))
    click.echo(err=on_stderr)
    if forgotten := conversation.num_forgotten - before:
        which = (
            "question and its answer" if forgotten == 1 else f"{forgotten} questions and answers"
        )
        log(f"There was no room for the oldest {which}, with what was answered: forgotten.")
    if answer.reason != "stop":
        log(f"The answer was cut after {answer.tokens} tokens.")
