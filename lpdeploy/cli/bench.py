"""`lpdeploy bench`: the speed of models and the cost of pruning."""

import os
from pathlib import Path
from typing import Any

import click

from lpdeploy.cli.common import (
    CONTEXT_SETTINGS,
    ENGINE,
    base_option,
    check_models,
    log,
    print_result,
    say_next,
    shared_options,
)
from lpdeploy.cli.options import GroupedCommand, build_config, config_options
from lpdeploy.cli.types import COUNT, FOLDER, MODEL, SOURCE, Count, ListOf, NameChoice
from lpdeploy.criteria import CRITERIA
from lpdeploy.engines import ENGINES
from lpdeploy.run_folder import RunFolder

_FORMS = {"merged": (True,), "unmerged": (False,), "both": (True, False)}


class _EngineAtPrecision(NameChoice):
    """An engine, which a precision may follow after a colon."""

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Check the engine, and that it has the precision."""
        name, colon, precision = value.partition(":")
        known = ENGINES[super().convert(name, param, ctx)].precisions
        if colon and precision not in known:
            choices = f"Use {', '.join(known)}" if known else "It takes that of the checkpoint"
            self.fail(f"{name} has no precision '{precision}'. {choices}.", param, ctx)
        return value


@click.group("bench", context_settings=CONTEXT_SETTINGS)
def command() -> None:
    """Measure the speed of models and the cost of pruning."""


@command.command("latency")
@click.argument("models", type=MODEL, nargs=-1, required=True, metavar="RUN|MODEL...")
@click.option(
    "--engine",
    "engines",
    type=ListOf(_EngineAtPrecision(lambda: ENGINE.choices)),
    default="torch,onnx",
    help=f"Time these engines, separated by commas: {', '.join(ENGINE.choices)}. Add a precision "
    "after a colon, as in ort:int4.",
)
@click.option("--merged", "form", flag_value="merged", help="Time only models with LoRA merged.")
@click.option(
    "--unmerged", "form", flag_value="unmerged", help="Time only models with a separate adapter."
)
@click.option(
    "--both", "form", flag_value="both", default="both", help="Time merged and unmerged models."
)
@click.option("--tokens", type=COUNT, default=2048, help="Number of prompt tokens.")
@click.option(
    "--decode",
    type=Count(0),
    default=0,
    help="Number of tokens to decode after the prompt.",
)
@click.option(
    "--batch",
    type=ListOf(COUNT),
    default="1",
    help="Number of prompts per batch. Separate several sizes by commas.",
)
@click.option(
    "--repeats", type=COUNT, default=100, help="Number of timed repetitions of each variant."
)
@config_options("device")
@base_option
@click.option(
    "--output", type=FOLDER, help="Write bench.json to this folder.  [default: the first RUN]"
)
@shared_options()
def latency(
    *,
    models: tuple[str, ...],
    form: str,
    tokens: int,
    decode: int,
    batch: tuple[int, ...],
    repeats: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Compare the latency of dense and pruned models (Table 3).

    Each RUN is timed together with its unpruned base, with LoRA merged and unmerged. The trials of
    all variants are interleaved, and each engine runs in its own process. Percentages are relative
    to the merged dense model on the same engine.
    """
    check_models(*(model for model in models if not RunFolder(model).is_complete))
    # Set before torch is imported: waiting OpenMP threads that spin take a core from the engine
    # that is timed next. In training, it costs more to wake the threads than this saves.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from lpdeploy.benchmark.stage import bench_latency
    from lpdeploy.benchmark.table import format_latency
    from lpdeploy.benchmark.worker import Workload
    from lpdeploy.cli.progress import counting_progress

    with counting_progress("bench") as on_progress:
        result, folder = bench_latency(
            models,
            forms=_FORMS[form],
            workloads=[Workload(tokens, decode, rows, repeats) for rows in batch],
            on_progress=on_progress,
            **options,
        )
    log(f"Wrote {RunFolder(folder).benchmark}, .md, .svg")
    print_result(result.to_json(), format_latency(result), as_json=as_json)
    if RunFolder(folder).is_complete:
        say_next("report", folder)


@command.command("pruning", cls=GroupedCommand)
@click.argument("model", type=MODEL)
@click.option(
    "--criterion",
    "criteria",
    type=ListOf(NameChoice(lambda: CRITERIA)),
    default="lora,gradient,magnitude",
    help=f"Compare these criteria, separated by commas: {', '.join(CRITERIA)}.",
)
@click.option(
    "--load-in", type=click.Choice(["8bit"]), help="Also measure lora with 8-bit weights."
)
@click.option("--steps", type=COUNT, default=10, help="Number of steps to measure before pruning.")
@config_options(
    *("ratio", "batch_size", "micro_batch_size", "seq_len", "lora_rank", "lora_dropout"),
    *("gradient_checkpointing", "dtype", "device"),
    batch_size=8,
    micro_batch_size=1,
)
@click.option(
    "--data",
    type=SOURCE,
    metavar="SOURCE",
    help="Train on this file, folder or hub name.  [default: random tokens]",
)
@click.option(
    "--output",
    type=FOLDER,
    default=Path(),
    help="Write bench-pruning.json to this folder.",
    show_default="the working folder",
)
@shared_options()
def pruning(
    *,
    model: str,
    criteria: tuple[str, ...],
    load_in: str | None,
    steps: int,
    data: str | None,
    output: Path,
    as_json: bool,
    **values: Any,
) -> None:
    """Compare the cost of a pruning step by criterion (Tables 4, 6).

    Measures the time, memory and operations of training steps, including scoring, before and after
    groups are removed. The pruned models are not saved. If MODEL has only a config.json, random
    weights are used, which cost the same. On a GPU, gradient is also measured with its gradients
    offloaded to the CPU.
    """
    config = build_config(values)
    from lpdeploy.benchmark.pruning import PruningWorkload
    from lpdeploy.benchmark.pruning_stage import bench_pruning
    from lpdeploy.benchmark.pruning_table import format_pruning
    from lpdeploy.cli.progress import counting_progress

    with counting_progress("bench") as on_progress:
        result = bench_pruning(
            model,
            PruningWorkload(config, steps),
            criteria=criteria,
            load_in=(load_in,) if load_in else (),
            data=data,
            output=output,
            on_progress=on_progress,
        )
    log(f"Wrote {output / 'bench-pruning.json'}, .md, .svg")
    print_result(result.to_json(), format_pruning(result), as_json=as_json)
