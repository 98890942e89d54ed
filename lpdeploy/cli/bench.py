"""`lpdeploy bench`: the speed of models and the cost of pruning."""

import os
from pathlib import Path
from typing import Any

import click

from lpdeploy.cli.common import (
    CONTEXT_SETTINGS,
    DEVICE_HELP,
    ENGINE,
    FOLDER,
    log,
    print_result,
    shared_options,
    split_names,
)
from lpdeploy.cli.options import GroupedCommand, build_config, config_options
from lpdeploy.criteria import CRITERIA
from lpdeploy.run_folder import RunFolder

_COUNT = click.IntRange(min=1)
_FORMS = {"merged": (True,), "unmerged": (False,), "both": (True, False)}


@click.group("bench", context_settings=CONTEXT_SETTINGS)
def command() -> None:
    """Measure the speed of models and the cost of pruning."""


@command.command("latency")
@click.argument("models", nargs=-1, required=True, metavar="RUN|MODEL...")
@click.option(
    "--engine",
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
@click.option("--tokens", type=_COUNT, default=2048, help="Number of prompt tokens.")
@click.option(
    "--decode",
    type=click.IntRange(min=0),
    default=0,
    help="Number of tokens to decode after the prompt.",
)
@click.option(
    "--batch", default="1", help="Number of prompts per batch. Separate several sizes by commas."
)
@click.option(
    "--repeats", type=_COUNT, default=100, help="Number of timed repetitions of each variant."
)
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help=DEVICE_HELP
)
@click.option(
    "--output", type=FOLDER, help="Write bench.json to this folder.  [default: the first RUN]"
)
@shared_options()
def latency(  # noqa: PLR0913 - one parameter an option
    *,
    models: tuple[str, ...],
    engine: str,
    form: str,
    tokens: int,
    decode: int,
    batch: str,
    repeats: int,
    device: str,
    output: Path | None,
    as_json: bool,
) -> None:
    """Compare the latency of dense and pruned models (the paper's Table 3).

    Each RUN is timed together with its unpruned base, with LoRA merged and unmerged. The trials of
    all variants are interleaved, and each engine runs in its own process. Percentages are relative
    to the merged dense model on the same engine.
    """
    # Set before torch is imported: OpenMP threads that spin while they wait take a core from the
    # engine that is timed next. In training, waking the threads would cost more than it saves.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from lpdeploy.benchmark.stage import bench_latency
    from lpdeploy.benchmark.table import format_latency
    from lpdeploy.benchmark.worker import Workload
    from lpdeploy.cli.progress import counting_progress

    with counting_progress("bench") as on_progress:
        result, folder = bench_latency(
            models,
            engines=_parse_engines(engine),
            forms=_FORMS[form],
            workloads=[Workload(tokens, decode, rows, repeats) for rows in _parse_batches(batch)],
            device=device,
            output=output,
            on_progress=on_progress,
        )
    log(f"Wrote {RunFolder(folder).benchmark}, .md, .svg")
    print_result(result.to_json(), format_latency(result), as_json=as_json)


@command.command("pruning", cls=GroupedCommand)
@click.argument("model")
@click.option(
    "--criterion",
    default="lora,gradient,magnitude",
    help=f"Compare these criteria, separated by commas: {', '.join(CRITERIA)}.",
)
@click.option(
    "--load-in", type=click.Choice(["8bit"]), help="Also measure lora with 8-bit weights."
)
@click.option("--steps", type=_COUNT, default=10, help="Number of steps to measure before pruning.")
@config_options(
    *("ratio", "batch_size", "micro_batch_size", "seq_len", "lora_rank", "lora_dropout"),
    *("gradient_checkpointing", "dtype", "device"),
    batch_size=8,
    micro_batch_size=1,
)
@click.option(
    "--data",
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
    criterion: str,
    load_in: str | None,
    steps: int,
    data: str | None,
    output: Path,
    as_json: bool,
    **values: Any,
) -> None:
    """Compare the cost of a pruning step by criterion (the paper's Tables 4 and 6).

    Measures the time, memory and operations of training steps, including scoring, before and after
    groups are removed. The pruned models are not saved. If MODEL has only a config.json, random
    weights are used, which cost the same. On a GPU, gradient is also measured with its gradients
    offloaded to the CPU.
    """
    config = build_config(values)
    criteria = _parse_criteria(criterion)
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


def _parse_criteria(text: str) -> tuple[str, ...]:
    criteria = split_names(text)
    if not criteria or set(criteria) - set(CRITERIA):
        raise click.UsageError(
            f"--criterion {text!r}: choose from {', '.join(CRITERIA)}, separated by commas."
        )
    return criteria


def _parse_engines(text: str) -> tuple[str, ...]:
    engines = split_names(text)
    unknown = [name for name in engines if name.partition(":")[0] not in ENGINE.choices]
    if unknown or not engines:
        known = ", ".join(ENGINE.choices)
        raise click.UsageError(
            f"--engine {text!r}: choose from {known}, separated by commas. A precision may "
            "follow after a colon, as in torch,ort,ort:int4."
        )
    return engines


def _parse_batches(text: str) -> tuple[int, ...]:
    sizes = split_names(text)
    if not sizes or not all(size.isdigit() and int(size) for size in sizes):
        raise click.UsageError(
            f"--batch {text!r}: give one or more positive integers, such as 1,8."
        )
    return tuple(int(size) for size in sizes)
