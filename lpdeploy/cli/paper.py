"""`lpdeploy paper`: the tables of the paper, on your own model."""

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from lpdeploy.cli import prune
from lpdeploy.cli.common import (
    CONTEXT_SETTINGS,
    limit_option,
    log,
    max_segments_option,
    perplexity_option,
    print_result,
    shared_options,
    task_data_option,
)
from lpdeploy.cli.options import build_config
from lpdeploy.cli.types import COUNT, FOLDER, MODEL, SOURCE, Count, ListOf, Number
from lpdeploy.config import PruneConfig
from lpdeploy.conflicts import BUDGETS, LATENCY, RATIOS
from lpdeploy.errors import LpdeployError
from lpdeploy.fields import rename_fields
from lpdeploy.paper.results import TableResult
from lpdeploy.paper.tables import TABLES, Row, Table

# The options of prune that this command sets itself.
_GIVEN = {"data", "output", "resume", "overwrite", "as_json", "seed", "preset"}
_GIVEN |= {*RATIOS, *BUDGETS, *LATENCY}


class CommandWithPrune(click.Command):
    """A command that says where the options of prune belong."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the words, or say that an option of prune stands before the dashes."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if error.option_name not in {o for p in prune.command.params for o in p.opts}:
                raise
            raise click.UsageError(
                f"{error.option_name} is an option of prune. Put it at the end, after '--'.",
                ctx=ctx,
            ) from error


@contextmanager
def parse_prune(
    model: str, data: str, words: Sequence[str], *, own: Sequence[str] = ()
) -> Iterator[tuple[click.Context, Mapping[str, Any]]]:
    """Parse options of prune with its own parser, as its process will.

    Args:
        model: What is pruned.
        data: What it is pruned with.
        words: What the user typed after the dashes.
        own: What the command adds to them.

    Yields:
        The context with all options, and those that the user typed.

    Raises:
        click.UsageError: They are wrong, or refused while this is open; says where they stand.
    """
    group = click.Context(click.Group("lpdeploy"), info_name="lpdeploy", **CONTEXT_SETTINGS)
    given = [model, "--data", data, "--output", "RUN", *words, *own]
    try:
        context = prune.command.make_context("prune", given, parent=group)
        typed, _, _ = prune.command.make_parser(context).parse_args(list(words))
        yield context, rename_fields(typed)
    except click.UsageError as error:
        reason = error.format_message()
        raise click.UsageError(f"In the options of prune after '--': {reason}") from error


class _TableChoice(click.Choice[str]):
    """A table or figure by its name; ``table-9`` is as good as ``9``."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return super().convert(str(value).removeprefix("table-"), param, ctx)


@click.command("paper", cls=CommandWithPrune)
@click.argument("table", type=_TableChoice(list(TABLES)), metavar="TABLE")
@click.argument("model", type=MODEL)
@click.argument("prune_options", nargs=-1, type=click.UNPROCESSED, metavar="[-- PRUNE_OPTIONS...]")
@click.option(
    "--data",
    required=True,
    type=SOURCE,
    metavar="SOURCE",
    help="Train and score all cells on this.",
)
@click.option(
    "--output",
    required=True,
    type=FOLDER,
    metavar="DIR",
    help="Write the table and its cells to this folder. Tables in one folder share their cells.",
)
@perplexity_option
@click.option(
    "--tasks",
    type=ListOf(),
    metavar="NAMES",
    help="Run these lm-eval tasks, separated by commas, on each cell.",
)
@task_data_option
@click.option(
    "--eval-seq-len",
    type=Count(2),
    default=2048,
    help="Number of tokens per perplexity segment.",
)
@max_segments_option
@limit_option
@click.option(
    "--seeds", type=COUNT, default=3, help="Number of seeds per row: 0, 1, ... Table 9 has one."
)
@click.option(
    "--ratios",
    type=ListOf(Number(0, 1, min_open=True, max_open=True)),
    help="Run these ratios, separated by commas, such as 0.2,0.5.  [default: those of the paper]",
)
@click.option(
    "--rows",
    type=ListOf(),
    help="Run only these rows of the table, separated by commas.  [default: all]",
)
@click.option(
    "--jobs",
    type=COUNT,
    default=1,
    help="Number of cells that run at the same time. Tables 4 and 6 measure time and need 1.",
)
@click.option(
    "--render-only", is_flag=True, help="Only write the table, from the cells that are done."
)
@shared_options()
def command(  # noqa: PLR0913 - one parameter an option
    *,
    table: str,
    model: str,
    prune_options: tuple[str, ...],
    data: str,
    output: Path,
    perplexity: tuple[str, ...],
    tasks: tuple[str, ...] | None,
    task_data: Path | None,
    eval_seq_len: int,
    max_segments: int | None,
    limit: int | None,
    seeds: int,
    ratios: tuple[float, ...] | None,
    rows: tuple[str, ...] | None,
    jobs: int,
    render_only: bool,
    as_json: bool,
) -> None:
    """Run a table or figure of the paper on your own MODEL.

    TABLE is 2, 4, 5, 6, 7, 8, 9, figure-4 or figure-6. Table 9 shows what the models answer to the
    paper's instructions. Seven more tables are not in the paper. forms compares how scores are
    summed, ramps when groups are removed, rates learning rates, refit pruning with and without
    --refit, and recipe LoRAPrune with the parts of --preset best together. recovery shows what each
    of these parts gives, and settings other settings of them.

    Each cell is a separate prune, compact and eval, repeated for several seeds. If you stop the
    command, run it again to continue: finished cells are kept. The table is written to DIR as JSON,
    Markdown and SVG. Options after -- are passed to every prune, such as --steps 200 or
    --recipe FILE.
    """
    check_parts(
        perplexity=perplexity,
        tasks=tasks,
        task_data=task_data,
        limit=limit,
        max_segments=max_segments,
    )
    spec = TABLES[table]
    options = _read_prune_options(spec, rows or (), model, data, prune_options)

    from lpdeploy.paper.cells import select
    from lpdeploy.paper.stage import adapt_evaluation, build_evaluation, build_study, run_paper

    evaluation = build_evaluation(
        perplexity,
        seq_len=eval_seq_len,
        max_segments=max_segments,
        tasks=tasks or (),
        task_data=task_data,
        limit=limit,
    )
    document = run_paper(
        select(spec, rows=rows or (), ratios=ratios or (), seeds=seeds),
        build_study(
            model,
            data=data,
            prune_words=prune_options,
            prune_options=options,
            evaluation=adapt_evaluation(spec, evaluation),
        ),
        output,
        jobs=jobs,
        render_only=render_only,
        show_progress=jobs == 1,
    )
    _print(document, output / spec.file_stem, as_json=as_json)


def check_parts(
    *,
    perplexity: Collection[str],
    tasks: Collection[str] | None,
    task_data: Path | None,
    limit: int | None,
    max_segments: int | None,
) -> None:
    """Refuse an option that says how to measure what is not measured."""
    for flag, given, needed in (
        ("--task-data", task_data, "--tasks NAMES" if not tasks else None),
        ("--limit", limit, "--tasks NAMES" if not tasks else None),
        ("--max-segments", max_segments, "--perplexity SOURCE" if not perplexity else None),
    ):
        if given and needed:
            raise click.UsageError(f"{flag} needs {needed}. Add it, or leave {flag} out.")


def _read_prune_options(
    table: Table, rows: tuple[str, ...], model: str, data: str, words: tuple[str, ...]
) -> dict[str, Any]:
    """Parse the options with prune's own parser, and refuse those that cells set or cannot have."""
    with parse_prune(model, data, words) as (context, typed):
        _refuse_typed(table, typed)
        _refuse_preset(context.params["preset"])
        names = [field.name for field in dataclasses.fields(PruneConfig)]
        options = _check_rows(table, rows, {n: context.params[n] for n in names if n not in _GIVEN})
    return {name: value for name, value in options.items() if name not in _GIVEN}


def _refuse_typed(table: Table, typed: Iterable[str]) -> None:
    for name in sorted((_GIVEN | table.own_options) & set(typed)):
        raise click.UsageError(
            f"--{name.removeprefix('as_').replace('_', '-')} is set by the cells of "
            f"{table.heading}. Remove it from the options of prune."
        )


def _refuse_preset(named: str | None) -> None:
    """Refuse a preset of a recipe; a typed one is refused by its name."""
    if named is not None:
        raise click.UsageError(
            "The recipe names a preset, which would set what the cells of a table compare. Write "
            "those of its options that all cells shall have into the recipe instead."
        )


def _check_rows(table: Table, rows: tuple[str, ...], given: dict[str, Any]) -> dict[str, Any]:
    """Check options together with those of each row that is to run, and return them as JSON.

    An option may need another one that the rows set, such as ``refit_samples``.
    """
    chosen = [row for row in table.rows if not row.dense and (not rows or row.name in rows)]
    options: dict[str, Any] = {}
    for row in chosen or [Row("none", "none")]:
        _refuse_shared(table, row, given)
        try:
            config = build_config({**given, **row.options})
        except click.UsageError as error:
            reason = error.format_message()
            which = f" Row '{row.name}' says so; --rows chooses others." if row.options else ""
            raise click.UsageError(f"{reason}{which}") from error
        # How LoRA starts is left open where the user does not say: each row has its own.
        own = {*row.options, "lora_init"}
        options = config.to_json() | {name: given[name] for name in own}
    return options


def _refuse_shared(table: Table, row: Row, given: Mapping[str, Any]) -> None:
    """Refuse what a recipe would set in a row that is compared with rows that set it."""
    plain = PruneConfig()
    for name in sorted(table.own_options - row.options.keys()):
        if given[name] != getattr(plain, name):
            raise click.UsageError(
                f"The recipe sets {name}, which only some cells of {table.heading} set. "
                "Remove it from the recipe."
            )


def _print(document: TableResult, stem: Path, *, as_json: bool) -> None:
    suffixes = [end for end in (".json", ".md", ".svg") if stem.with_suffix(end).is_file()]
    log(f"Wrote {stem}{', '.join(suffixes)}")
    text = stem.with_suffix(".md").read_text(encoding="utf-8")
    print_result(document.to_json(), text, as_json=as_json)
    if document.failed:
        raise LpdeployError(
            f"{len(document.failed)} of {document.cells} cells failed. First error: "
            f"{document.failed[0].error} Run the same command again to retry them."
        )
