"""`lpdeploy eval`: the quality of a model."""

from pathlib import Path
from typing import Any

import click

from lpdeploy.cli.common import (
    ENGINE,
    base_option,
    check_models,
    limit_option,
    max_segments_option,
    perplexity_option,
    print_result,
    say_next,
    shared_options,
    task_data_option,
    write_flags,
)
from lpdeploy.cli.options import config_options
from lpdeploy.cli.types import COUNT, MODEL, Count, ListOf
from lpdeploy.evaluation.options import EvalOptions
from lpdeploy.evaluation.results import Evaluation, Figures, Metrics
from lpdeploy.run_folder import RunFolder


@click.command("eval")
@click.argument("model", type=MODEL, metavar="RUN|MODEL")
@perplexity_option
@click.option(
    "--seq-len",
    type=Count(2),
    default=EvalOptions.seq_len,
    help="Number of tokens per perplexity segment.",
)
@max_segments_option
@click.option(
    "--tasks",
    type=ListOf(),
    metavar="NAMES",
    help="Run these lm-eval tasks, separated by commas, such as piqa,arc_easy,mmlu.",
)
@task_data_option
@click.option(
    "--num-fewshot",
    type=Count(0),
    help="Number of examples before each question.  [default: 5 for mmlu, else the task's own "
    "number or 0]",
)
@limit_option
@click.option(
    "--batch-size",
    type=COUNT,
    default=EvalOptions.batch_size,
    help="Number of perplexity segments or task answers per forward pass.",
)
@click.option("--engine", type=ENGINE, default="torch", help="Engine that runs the model.")
@click.option("--with-base", is_flag=True, help="Also measure the unpruned base of a RUN.")
@base_option
@config_options("device")
@shared_options()
def command(
    *,
    model: str,
    engine: str,
    with_base: bool,
    base: Path | None,
    device: str,
    as_json: bool,
    **values: Any,
) -> None:
    """Measure perplexity and task accuracy of a RUN or MODEL.

    A RUN must be compacted first. Its results are added to RUN/eval.json.
    """
    try:
        options = EvalOptions(**{**values, "tasks": values["tasks"] or ()})
    except ValueError as error:
        raise click.UsageError(write_flags(f"{error}.")) from error
    check_models(model)
    from lpdeploy.data.sources import check_source

    for source in options.perplexity:
        check_source(source)

    from lpdeploy.cli.progress import counting_progress
    from lpdeploy.evaluation.evaluate import evaluate

    with counting_progress("eval") as progress:
        result = evaluate(
            model,
            options,
            engine=engine,
            with_base=with_base,
            base=base,
            device=device,
            on_progress=lambda _, done, total: progress(done, total),
        )
    print_result(result.to_json(), _describe(result), as_json=as_json)
    if RunFolder(model).is_complete:
        say_next("report", model)


def _describe(result: Evaluation) -> str:
    base = [] if result.base is None else _list_lines("unpruned base", result.base)
    return "\n".join([*_list_lines(result.model, result.figures), *base])


def _list_lines(name: str, figures: Figures) -> list[str]:
    lines = [
        f"{name} on {Path(source).name}: perplexity {text.perplexity:.2f}, "
        f"{text.bits_per_byte:.3f} bits per byte, {text.tokens:,} tokens"
        for source, text in figures.perplexity.items()
    ]
    lines += [
        f"{name} on {task}: {_list_metrics(metrics)}, n {metrics['n']:,}"
        for task, metrics in figures.tasks.items()
    ]
    if figures.average is not None:
        over = ", ".join(figures.average_over)
        error = _show_error(figures.errors.get("average"))
        lines.append(f"{name}, average of {over}: {figures.average:.4f}{error}")
    return lines


def _list_metrics(measured: Metrics) -> str:
    shown = []
    for metric, value in measured.items():
        if metric in {"n", "num_fewshot"} or "_stderr" in metric or value is None:
            continue
        base, _, chosen = metric.partition(",")
        error = measured.get(f"{base}_stderr,{chosen}" if chosen else f"{base}_stderr")
        shown.append(f"{metric} {value:.4f}{_show_error(error)}")
    return ", ".join(shown)


def _show_error(error: float | None) -> str:
    return "" if error is None else f" +- {error:.4f}"
