"""`lpdeploy generate`: what a model writes after a prompt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lpdeploy.cli.common import ENGINE, base_option, check_models, log, print_result, shared_options
from lpdeploy.cli.options import config_options
from lpdeploy.cli.sampling import build_generate_options, sampling_options
from lpdeploy.cli.types import MODEL
from lpdeploy.generation.examples import PAPER
from lpdeploy.generation.options import AUTO, FORMATS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lpdeploy.generation.results import Generated

_STDIN = "-"


@click.command("generate")
@click.argument("model", type=MODEL, metavar="RUN|MODEL")
@click.argument("prompt", required=False)
@click.option(
    "--prompts",
    "file",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Read a prompt from each line of this file, or from each row of a .jsonl file.",
)
@click.option("--examples", is_flag=True, help="Use the three instructions of the paper's Table 9.")
@click.option(
    "--prompt-format",
    type=click.Choice(FORMATS),
    help="Ask the prompt as the turn of a user: in the model's own template (chat-template), under "
    "fixed headings (instruction), or in its template if it has one (auto). raw continues the "
    "prompt as it is.  [default: chat-template if the model has one, else raw; auto with "
    "--examples]",
)
@sampling_options(seed=0)
@click.option("--engine", type=ENGINE, default="torch", help="Engine that runs the model.")
@click.option("--with-base", is_flag=True, help="Show the answers of the unpruned base of a RUN.")
@base_option
@click.option("--save", is_flag=True, help="Keep the answers in RUN, for the page of report.")
@config_options("device")
@shared_options()
def command(
    *,
    model: str,
    prompt: str | None,
    file: Path | None,
    examples: bool,
    prompt_format: str | None,
    as_json: bool,
    **values: Any,
) -> None:
    """Let a RUN or MODEL continue a PROMPT, or answer it.

    Without PROMPT, or with -, it is read from standard input. A RUN must be compacted first. The
    text is shown as it is written; with --with-base, both texts are shown side by side at the end.
    """
    default = AUTO if examples else None
    options = build_generate_options(values, prompt_format=prompt_format or default)
    prompts = _read_prompts(prompt, file, examples=examples)
    check_models(model)

    from lpdeploy.generation.results import describe_speed
    from lpdeploy.generation.stage import generate_texts

    show = _Stream(titles=len(prompts) > 1) if not (as_json or values["with_base"]) else None
    callbacks: Any = {} if show is None else {"on_prompt": show.begin, "on_text": show.write}
    found = generate_texts(model, prompts, options, **values, **callbacks)
    if show is not None:
        show.end()
    elif not as_json:
        _print_columns(found)
    log(describe_speed(found))
    if as_json:
        base = found[1].to_json() if len(found) > 1 else None
        print_result({**found[0].to_json(), "base": base}, "", as_json=True)


def _read_prompts(prompt: str | None, file: Path | None, *, examples: bool) -> Sequence[str]:
    given = [prompt is not None, file is not None, examples]
    if sum(given) > 1:
        raise click.UsageError("Give one of PROMPT, --prompts and --examples.")
    if examples:
        return PAPER
    if file is not None:
        from lpdeploy.generation.prompts import load_prompts

        return load_prompts(file)
    if prompt not in (None, _STDIN):
        return [prompt or ""]
    stream = sys.stdin
    if prompt is None and stream.isatty():
        raise click.UsageError("Give a PROMPT, --prompts FILE or --examples.")
    return [stream.read().removesuffix("\n")]


class _Stream:
    """Shows answers as they are written, each under its prompt if there are several."""

    def __init__(self, *, titles: bool) -> None:
        self._titles = titles
        self._begun = False

    def begin(self, prompt: str) -> None:
        if self._begun:
            click.echo("\n")
        self._begun = True
        if self._titles:
            click.secho(prompt, bold=True)

    def write(self, text: str) -> None:
        click.echo(text, nl=False)

    def end(self) -> None:
        click.echo()


def _print_columns(found: Sequence[Generated]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE, show_lines=True, expand=True)
    table.add_column("prompt", ratio=1)
    for name in ("pruned", "unpruned"):
        table.add_column(name, ratio=2)
    for answers in zip(*(each.answers for each in found), strict=True):
        said = [answers[0].prompt, *(answer.text for answer in answers)]
        table.add_row(*(Text(text) for text in said))
    Console().print(table)
