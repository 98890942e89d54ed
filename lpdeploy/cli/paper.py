"""`lpdeploy paper`: the tables of the paper, on one's own model."""

import dataclasses
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from lpdeploy.cli import prune
from lpdeploy.cli.common import (
    CONTEXT_SETTINGS,
    FOLDER,
    log,
    print_result,
    shared_options,
    split_names,
)
from lpdeploy.cli.options import build_config
from lpdeploy.config import BUDGETS, LATENCY, RATIOS, PruneConfig, rename_fields
from lpdeploy.errors import LpdeployError
from lpdeploy.paper.results import TableResult
from lpdeploy.paper.tables import TABLES, Table

# What the command itself gives to every prune.
_GIVEN = (
    *("data", "output", "resume", "overwrite", "as_json", "seed"),
    *(*RATIOS, *BUDGETS, *LATENCY),
)


class _Command(click.Command):
    """Tells where an option of prune belongs."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if error.option_name not in {o for p in prune.command.params for o in p.opts}:
                raise
            raise click.UsageError(
                f"{error.option_name} is an option of prune: give it at the end, after '--'.",
                ctx=ctx,
            ) from error


def _parse_list(_ctx: click.Context, _own: click.Parameter, value: Any) -> tuple[str, ...]:
    return split_names(value)


def _parse_ratios(ctx: click.Context, own: click.Parameter, value: Any) -> tuple[float, ...]:
    share: click.ParamType = click.FloatRange(0, 1, min_open=True, max_open=True)
    return tuple(share.convert(part, own, ctx) for part in split_names(value))


@click.command("paper", cls=_Command)
@click.argument("table", type=click.Choice(list(TABLES)), metavar="TABLE")
@click.argument("model")
@click.argument("prune_options", nargs=-1, type=click.UNPROCESSED, metavar="[-- PRUNE_OPTIONS...]")
@click.option("--data", required=True, metavar="SOURCE", help="What every cell is pruned with.")
@click.option(
    "--output", required=True, type=FOLDER, metavar="DIR", help="Tables in one DIR share cells."
)
@click.option(
    "--perplexity",
    multiple=True,
    metavar="SOURCE",
    help="File, folder or hub name (wikitext2, ptb); may be given several times.",
)
@click.option("--tasks", metavar="NAMES", help="Tasks for eval, with commas between them.")
@click.option("--task-data", type=click.Path(file_okay=False, exists=True), help="Their folder.")
@click.option(
    "--eval-seq-len", type=click.IntRange(min=2), default=2048, help="Tokens a segment of eval."
)
@click.option("--seeds", type=click.IntRange(min=1), default=3, help="Runs of each row: 0, 1, ...")
@click.option(
    "--ratios", callback=_parse_ratios, help="Such as 0.2,0.5.  [default: those of the paper]"
)
@click.option("--rows", callback=_parse_list, help="Only some rows.  [default: all]")
@click.option(
    "--jobs", type=click.IntRange(min=1), default=1, help="Cells at a time; 1 in tables 4 and 6."
)
@click.option("--render-only", is_flag=True, help="Write the table from the cells in DIR.")
@shared_options()
def command(  # noqa: PLR0913 - one parameter an option
    *,
    table: str,
    model: str,
    prune_options: tuple[str, ...],
    data: str,
    output: Path,
    perplexity: tuple[str, ...],
    tasks: str | None,
    task_data: str | None,
    eval_seq_len: int,
    seeds: int,
    ratios: tuple[float, ...],
    rows: tuple[str, ...],
    jobs: int,
    render_only: bool,
    as_json: bool,
) -> None:
    """Run a table or figure of the paper on MODEL: 2, 4, 5, 6, 7, 8, figure-4 or figure-6.

    Two are ours: forms (how scores are summed) and ramps (when groups go).

    Each cell is a prune, compact and eval of its own, for several seeds. Cells that are done are
    never run again: the same command goes on where it was stopped. DIR gets the table as JSON,
    Markdown and SVG. What stands after -- goes to every prune: steps, batch size, --recipe FILE.
    """
    if task_data and not tasks:
        raise click.UsageError("--task-data is about tasks. Give --tasks NAMES, or leave it out.")
    spec = TABLES[table]
    options = _read_prune_options(spec, model, data, prune_options)

    from lpdeploy.paper.cells import select
    from lpdeploy.paper.stage import build_evaluation, build_study, run_paper

    evaluation = build_evaluation(
        perplexity, seq_len=eval_seq_len, tasks=tasks, task_data=task_data
    )
    if evaluation and spec.kind == "similarity":
        log(f"{spec.heading} compares masks alone: --perplexity and --tasks are not used.")
    document = run_paper(
        select(spec, rows=rows, ratios=ratios, seeds=seeds),
        build_study(
            model,
            data=data,
            prune_words=prune_options,
            prune_options=options,
            evaluation=evaluation,
        ),
        output,
        jobs=jobs,
        render_only=render_only,
        show_progress=jobs == 1 and sys.stderr.isatty(),
        log=log,
    )
    _print(document, output / spec.file_stem, as_json=as_json)


def _read_prune_options(
    table: Table, model: str, data: str, words: tuple[str, ...]
) -> dict[str, Any]:
    """Let prune's own parser read the options, before anything runs; refuse what cells set."""
    group = click.Context(click.Group("lpdeploy"), info_name="lpdeploy", **CONTEXT_SETTINGS)
    given = [model, "--data", data, "--output", "RUN"]
    try:
        context = prune.command.make_context("prune", [*given, *words], parent=group)
        typed, _, _ = prune.command.make_parser(context).parse_args(list(words))
        names = [field.name for field in dataclasses.fields(PruneConfig)]
        config = build_config({n: context.params[n] for n in names if n not in _GIVEN})
    except click.UsageError as error:
        reason = error.format_message()
        raise click.UsageError(f"The options of prune, after '--': {reason}") from error
    options = config.to_json()
    _refuse_own(table, options, rename_fields(typed))
    return {name: value for name, value in options.items() if name not in _GIVEN}


def _refuse_own(table: Table, options: Mapping[str, Any], typed: Iterable[str]) -> None:
    for name in sorted({*_GIVEN, *table.own_options} & set(typed)):
        raise click.UsageError(
            f"--{name.removeprefix('as_').replace('_', '-')} is set by the cells of "
            f"{table.heading}. Leave it out of the options of prune."
        )
    # Of a recipe, what a cell sets wins. These two a cell cannot switch off again.
    for name in ("load_in", "offload_gradients"):
        if name in table.own_options and options.get(name):
            raise click.UsageError(
                f"The recipe gives {name}, which only some cells of {table.heading} set. "
                "Leave it out of the recipe."
            )


def _print(document: TableResult, stem: Path, *, as_json: bool) -> None:
    log(f"Written: {stem}.json, .md, .svg")
    text = stem.with_suffix(".md").read_text(encoding="utf-8")
    print_result(document.to_json(), text, as_json=as_json)
    if document.failed:
        raise LpdeployError(
            f"{len(document.failed)} of {document.cells} cells failed, the first with: "
            f"{document.failed[0].error} The same command tries them again."
        )
