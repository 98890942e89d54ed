"""`lpdeploy sweep`: several ratios and criteria, and a comparison of them."""

import dataclasses
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lpdeploy.cli.common import (
    limit_option,
    log,
    max_segments_option,
    perplexity_option,
    print_result,
    shared_options,
    task_data_option,
)
from lpdeploy.cli.options import apply_preset, build_config, drop_overruled
from lpdeploy.cli.paper import CommandWithPrune, check_parts, parse_prune
from lpdeploy.cli.types import FOLDER, MODEL, SOURCE, Count, ListOf, NameChoice, Number
from lpdeploy.config import PruneConfig
from lpdeploy.conflicts import BUDGETS, LATENCY, RATIOS
from lpdeploy.criteria import CRITERIA
from lpdeploy.errors import LpdeployError

if TYPE_CHECKING:
    from lpdeploy.sweep import SweepResult

# The options of prune that this command sets itself.
_GIVEN = {
    "data",
    "output",
    "resume",
    "overwrite",
    "dry_run",
    "as_json",
    *RATIOS,
    *BUDGETS,
    *LATENCY,
}


@click.command("sweep", cls=CommandWithPrune)
@click.argument("model", type=MODEL)
@click.argument("prune_options", nargs=-1, type=click.UNPROCESSED, metavar="[-- PRUNE_OPTIONS...]")
@click.option(
    "--ratio",
    required=True,
    type=ListOf(Number(0, 1, min_open=True, max_open=True)),
    metavar="LIST",
    help="Remove these shares of the groups, separated by commas, such as 0.2,0.3,0.5.",
)
@click.option(
    "--criterion",
    type=ListOf(NameChoice(lambda: CRITERIA)),
    metavar="LIST",
    help="Choose groups by these criteria, separated by commas.  [default: as prune does]",
)
@click.option(
    "--data",
    required=True,
    type=SOURCE,
    metavar="SOURCE",
    help="Train and score all runs on this.",
)
@click.option(
    "--output",
    required=True,
    type=FOLDER,
    metavar="DIR",
    help="Write a folder for each run, and the comparison compare.html, to this folder.",
)
@perplexity_option
@click.option(
    "--eval-seq-len", type=Count(2), default=2048, help="Number of tokens per perplexity segment."
)
@max_segments_option
@click.option(
    "--tasks",
    type=ListOf(),
    metavar="NAMES",
    help="Run these lm-eval tasks, separated by commas, on each run.",
)
@task_data_option
@limit_option
@shared_options()
def command(
    *,
    model: str,
    prune_options: tuple[str, ...],
    ratio: tuple[float, ...],
    criterion: tuple[str, ...] | None,
    data: str,
    output: Path,
    as_json: bool,
    **measured: Any,
) -> None:
    """Prune MODEL at several ratios and compare the results.

    Each run is a separate prune, compact and eval in DIR/NAME. If you stop the command, run it
    again to continue: finished runs are kept, and you may add ratios and criteria. Options after --
    are passed to every prune, such as --steps 200, --preset best or --recipe FILE.
    """
    seq_len = measured.pop("eval_seq_len")
    check_parts(**measured)
    if not measured["perplexity"] and not measured["tasks"]:
        raise click.UsageError(
            "Give --perplexity SOURCE, --tasks NAMES or both to compare runs by."
        )
    pairs = list(dict.fromkeys(itertools.product(criterion or (None,), ratio)))
    if len(pairs) < 2:
        raise click.UsageError("Give two ratios or more, or two criteria: a sweep compares runs.")
    options = {pair: _read_options(model, data, prune_options, *pair) for pair in pairs}

    from lpdeploy.paper.stage import build_evaluation, build_study
    from lpdeploy.report.compare import format_comparison
    from lpdeploy.sweep import Combination, run_sweep

    study = build_study(
        model,
        data=data,
        prune_words=prune_options,
        prune_options={},
        evaluation=build_evaluation(
            **{**measured, "tasks": measured["tasks"] or ()}, seq_len=seq_len
        ),
    )
    combinations = [Combination(share, how, options[how, share]) for how, share in pairs]
    found = run_sweep(combinations, study, output, show_progress=True)
    text = format_comparison(found.comparison) if found.comparison else ""
    if found.page is not None:
        log(f"Wrote {found.page}")
    print_result(found.to_json(), text, as_json=as_json)
    _check_failed(found, len(pairs))


def _check_failed(found: "SweepResult", count: int) -> None:
    if found.failed:
        name, error = next(iter(found.failed.items()))
        raise LpdeployError(
            f"{len(found.failed)} of {count} runs failed. First error, of {name}: {error} Run the "
            "same command again to retry them."
        )


def _read_options(
    model: str, data: str, words: tuple[str, ...], criterion: str | None, ratio: float
) -> dict[str, Any]:
    """Parse the options of one run with prune's own parser, as its process will."""
    own = ["--ratio", str(ratio), *(["--criterion", criterion] if criterion else [])]
    with parse_prune(model, data, words, own=own) as (context, typed):
        _refuse_typed(typed, criterion)
        with context.scope(cleanup=False):
            values = {
                field.name: context.params[field.name] for field in dataclasses.fields(PruneConfig)
            }
            drop_overruled(values)
            apply_preset(values, context.params["preset"])
            return build_config(values).to_json()


def _refuse_typed(typed: Iterable[str], criterion: str | None) -> None:
    for name in sorted((_GIVEN | ({"criterion"} if criterion else set())) & set(typed)):
        raise click.UsageError(
            f"--{name.removeprefix('as_').replace('_', '-')} is set for each run. Remove it from "
            "the options of prune."
        )
