"""`lpdeploy prune`: Algorithm 1 on a model and data."""

import dataclasses
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from lpdeploy.cli.common import (
    FOLDER,
    NameChoice,
    log,
    print_result,
    shared_options,
    write_flags,
)
from lpdeploy.cli.options import (
    GroupedCommand,
    GroupedOption,
    apply_preset,
    build_config,
    config_options,
    drop_overruled,
    is_typed,
)
from lpdeploy.config import CHOOSE, DATA
from lpdeploy.machine import format_bytes
from lpdeploy.presets import PRESETS

# Without these a batch still says over how many rows a gradient is taken that scores groups.
_TRAINING_ONLY = ("epochs", "steps", "lr", "lr_warmup", "lr_hold", "max_grad_norm")


@click.command("prune", cls=GroupedCommand)
@click.argument("model")
@click.option(
    "--data",
    cls=GroupedOption,
    group=DATA,
    required=True,
    metavar="SOURCE",
    help="Train and score on this file, folder or hub name.",
)
@click.option(
    "--cache/--no-cache",
    cls=GroupedOption,
    group=DATA,
    default=True,
    help="Cache the tokens of SOURCE, and the results of trials, for later runs, in "
    "$LPDEPLOY_CACHE or beside the hub's cache.",
)
@click.option(
    "--preset",
    cls=GroupedOption,
    group=CHOOSE,
    type=NameChoice(lambda: PRESETS),
    help="Start from named options. Those on the command line override them; they override those "
    "of a recipe, unless the preset is in the recipe. best: --criterion obs --refit --distill 0.5 "
    "--depth auto --lr auto, which measured best. loraprune: the paper's method to the letter.",
)
@config_options()
@click.option(
    "--output", required=True, type=FOLDER, metavar="RUN", help="Write the run to this folder."
)
@click.option(
    "--resume", is_flag=True, help="Continue the stopped run in RUN from its last saved state."
)
@click.option("--overwrite", is_flag=True, help="Replace an existing run in RUN.")
@shared_options()
def command(
    *,
    model: str,
    data: str,
    output: Path,
    cache: bool,
    resume: bool,
    overwrite: bool,
    as_json: bool,
    **values: Any,
) -> None:
    """Prune MODEL while fine-tuning it with LoRA.

    Writes a run folder with the plan, the adapter and the log. Run `lpdeploy compact` next to get
    the smaller model.
    """
    drop_overruled(values)
    apply_preset(values, values.pop("preset"))
    config = build_config(values)
    if config.removal is None and config.effective_removal == "mask":
        log("Groups are masked until the end: 4-bit and sharded weights cannot be cut in place.")
    unused = [f"`{name}`" for name in _TRAINING_ONLY if is_typed(name)]
    if config.schedule == "one-shot" and unused:
        log(write_flags(f"Without effect, as there is no fine-tuning: {', '.join(unused)}."))

    from lpdeploy.benchmark.target import resolve_options
    from lpdeploy.cli.progress import counting_progress, training_progress
    from lpdeploy.cli.signals import explain_interrupt, stop_on_signal
    from lpdeploy.pruning.ranks import leave_ranks
    from lpdeploy.pruning.run import prune
    from lpdeploy.servers.check import describe_forecast

    stop, begun = threading.Event(), threading.Event()
    with (
        explain_interrupt(begun),
        counting_progress("tokenize") as on_tokenize,
        counting_progress("unpruned model") as on_distill,
        training_progress() as on_step,
        ExitStack() as signals,
    ):

        def start() -> None:
            log(describe_forecast(model, config))
            signals.enter_context(stop_on_signal(stop))
            begun.set()

        given: dict[str, Any] = {
            "output": output,
            "data": data,
            "cache": cache,
            "resume": resume,
            "overwrite": overwrite,
            "on_tokenize": on_tokenize,
        }
        config, target = resolve_options(model, config, **given)
        calls: dict[str, Any] = {"on_distill": on_distill, "on_start": start, "on_step": on_step}
        result = prune(model, **given, **calls, options=config, target=target, stop=stop)
    leave_ranks()
    print_result(dataclasses.asdict(result), _describe(result), as_json=as_json)
    log(f"Next: lpdeploy compact {output}")


def _describe(result: Any) -> str:
    achieved = result.achieved
    layers = f"{achieved['layers']:.1%} of the layers, " if achieved["layers"] else ""
    return (
        f"{result.run}: {layers}{achieved['heads']:.1%} of the heads, "
        f"{achieved['channels']:.1%} of the channels and {achieved['parameters']:.1%} of the "
        f"parameters removed in {result.steps} steps, {result.seconds:.0f} s, "
        f"{format_bytes(result.peak_bytes)}; "
        f"{_describe_loss(result)}"
    )


def _describe_loss(result: Any) -> str:
    if result.steps or result.last_event is None:
        return f"training loss {result.loss:.3f}"
    before, after = result.last_event.before, result.last_event.after
    if result.achieved["layers"]:
        return (
            f"loss of held-out rows {before:.3f} once layers were dropped, {after:.3f} at the end"
        )
    return f"loss of held-out rows {before:.3f} before the removal, {after:.3f} after"
