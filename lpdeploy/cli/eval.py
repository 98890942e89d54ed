"""`lpdeploy eval`: the quality of a model."""

from pathlib import Path
from typing import Any

import click

from lpdeploy.cli.common import (
    DEVICE_HELP,
    ENGINE,
    print_result,
    shared_options,
    split_names,
    write_flags,
)
from lpdeploy.evaluation.options import EvalOptions
from lpdeploy.evaluation.results import Evaluation, Figures, Metrics


class _Names(click.ParamType):
    """Names separated by commas, or a list in a recipe."""

    name = "names"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        names = split_names(value)
        if not names:
            self.fail(
                f"{value!r} names no task. Give one or more, such as piqa,arc_easy", param, ctx
            )
        return names


@click.command("eval")
@click.argument("model", metavar="RUN|MODEL")
@click.option(
    "--perplexity",
    multiple=True,
    metavar="SOURCE",
    help="Measure perplexity on this file, folder or hub name (wikitext2, ptb). May be repeated.",
)
@click.option(
    "--seq-len",
    type=click.IntRange(min=2),
    default=EvalOptions.seq_len,
    help="Number of tokens per perplexity segment.",
)
@click.option(
    "--tasks",
    type=_Names(),
    metavar="NAMES",
    help="Run these lm-eval tasks, separated by commas, such as piqa,arc_easy,mmlu.",
)
@click.option(
    "--task-data",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Read the tasks from DIRECTORY/NAME.jsonl instead of the hub.",
)
@click.option(
    "--num-fewshot",
    type=click.IntRange(min=0),
    help="Number of examples before each question.  [default: 5 for mmlu, else the task's own "
    "number or 0]",
)
@click.option(
    "--limit", type=click.IntRange(min=1), help="Use at most this many documents per task."
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=EvalOptions.batch_size,
    help="Number of perplexity segments or task answers per forward pass.",
)
@click.option("--engine", type=ENGINE, default="torch", help="Engine that runs the model.")
@click.option("--with-base", is_flag=True, help="Also measure the unpruned base of a RUN.")
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help=DEVICE_HELP
)
@shared_options()
def command(
    *, model: str, engine: str, with_base: bool, device: str, as_json: bool, **values: Any
) -> None:
    """Measure perplexity and task accuracy of a RUN or MODEL.

    A RUN must be compacted first. Its results are added to RUN/eval.json.
    """
    try:
        options = EvalOptions(**{**values, "tasks": values["tasks"] or ()})
    except ValueError as error:
        raise click.UsageError(write_flags(f"{error}.")) from error

    from lpdeploy.cli.progress import counting_progress
    from lpdeploy.evaluation.evaluate import evaluate

    with counting_progress("eval") as progress:
        result = evaluate(
            model,
            options,
            engine=engine,
            with_base=with_base,
            device=device,
            on_progress=lambda _, done, total: progress(done, total),
        )
    print_result(result.to_json(), _describe(result), as_json=as_json)


def _describe(result: Evaluation) -> str:
    lines = _list_lines(result.model, result.figures)
    if result.base is not None:
        lines += _list_lines("unpruned base", result.base)
    return "\n".join(lines)


def _list_lines(name: str, figures: Figures) -> list[str]:
    lines = [
        f"{name} on {Path(source).name}: perplexity {text.perplexity:.2f}, "
        f"{text.bits_per_byte:.3f} bits per byte, {text.tokens:,} tokens"
        for source, text in figures.perplexity.items()
    ]
    for task, metrics in figures.tasks.items():
        lines.append(f"{name} on {task}: {_list_metrics(metrics)}, n {metrics['n']:,}")
    if figures.average is not None:
        over = ", ".join(figures.average_over)
        lines.append(f"{name}, average of {over}: {figures.average:.4f}")
    return lines


def _list_metrics(measured: Metrics) -> str:
    shown = []
    for metric, value in measured.items():
        if metric in {"n", "num_fewshot"} or "_stderr" in metric or value is None:
            continue
        base, _, chosen = metric.partition(",")
        error = measured.get(f"{base}_stderr,{chosen}" if chosen else f"{base}_stderr")
        shown.append(f"{metric} {value:.4f}" + (f" +- {error:.4f}" if error is not None else ""))
    return ", ".join(shown)
