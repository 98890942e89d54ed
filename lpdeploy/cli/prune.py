"""`lpdeploy prune`: Algorithm 1 on a model and data."""

import dataclasses
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from lpdeploy.cli.common import log, print_result, say_next, shared_options, write_flags
from lpdeploy.cli.options import (
    GroupedCommand,
    GroupedOption,
    apply_preset,
    build_config,
    config_options,
    drop_overruled,
    is_typed,
)
from lpdeploy.cli.types import FOLDER, MODEL, SOURCE, NameChoice
from lpdeploy.config import CHOOSE, DATA, PruneConfig
from lpdeploy.machine import format_bytes
from lpdeploy.presets import PRESETS


def _list_trackers() -> tuple[str, ...]:
    from lpdeploy.pruning.tracking import TRACKERS

    return TRACKERS


_MANY_PASSES = 10  # over few rows, which a model learns by heart
# Without these a batch still says over how many rows a gradient is taken that scores groups.
_TRAINING_ONLY = ("epochs", "steps", "lr", "lr_warmup", "lr_hold", "max_grad_norm")


@click.command("prune", cls=GroupedCommand)
@click.argument("model", type=MODEL)
@click.option(
    "--data",
    cls=GroupedOption,
    group=DATA,
    required=True,
    type=SOURCE,
    metavar="SOURCE",
    help="Train and score on this file, folder or hub name.",
)
@click.option(
    "--valid",
    cls=GroupedOption,
    group=DATA,
    type=SOURCE,
    metavar="SOURCE",
    help="Measure the loss on this text during training. It should not be in --data.",
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
    "--report-to",
    multiple=True,
    type=NameChoice(_list_trackers),
    help="Report each step to this experiment tracker, which must be installed. May be repeated.",
)
@click.option(
    "--resume", is_flag=True, help="Continue the stopped run in RUN from its last saved state."
)
@click.option("--overwrite", is_flag=True, help="Replace an existing run in RUN.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Check everything, show what the run would do, and stop. Nothing is written to RUN.",
)
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
    from lpdeploy.pruning.inputs import check_data, check_place

    dry_run = values.pop("dry_run")
    beside = {name: values.pop(name) for name in ("valid", "report_to")}
    drop_overruled(values)
    apply_preset(values, values.pop("preset"))
    config = build_config(values)
    _warn(config)
    given: dict[str, Any] = {"data": data, "output": output, "cache": cache}
    given |= {"resume": resume, "overwrite": overwrite}
    check_place(model, output, resume=resume, overwrite=overwrite)
    check_data(config, data=data, **beside)
    log(f"Loading '{model}'.")
    if dry_run:
        _show_dry_run(model, config, **given, valid=beside["valid"], as_json=as_json)
        return
    result = _prune(model, config, given, beside)
    print_result(dataclasses.asdict(result), _describe(result), as_json=as_json)
    say_next("compact", output)


def _prune(model: str, config: PruneConfig, given: dict[str, Any], beside: dict[str, Any]) -> Any:
    """Run it with its progress shown; ``given`` goes to the trials as well, ``beside`` does not."""
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
            log(describe_forecast(model, options))
            signals.enter_context(stop_on_signal(stop))
            begun.set()

        given["on_tokenize"] = on_tokenize
        options, target = resolve_options(model, config, **given)
        chosen: dict[str, Any] = {"options": options, "target": target, "stop": stop}
        calls: dict[str, Any] = {"on_distill": on_distill, "on_start": start, "on_step": on_step}
        result = prune(model, **given, **beside, **chosen, **calls)
    leave_ranks()
    return result


def _warn(config: PruneConfig) -> None:
    """Say what an option brings with it, or does not."""
    if config.removal is None and config.effective_removal == "mask":
        log("Groups are masked until the end: 4-bit and sharded weights cannot be cut in place.")
    unused = [f"`{name}`" for name in _TRAINING_ONLY if is_typed(name)]
    if config.schedule == "one-shot" and unused:
        log(write_flags(f"Without effect, as there is no fine-tuning: {', '.join(unused)}."))


def _show_dry_run(
    model: str, config: PruneConfig, *, resume: bool, as_json: bool, **given: Any
) -> None:
    if resume:
        raise click.UsageError("--dry-run is for a new run. Leave out --resume.")

    from lpdeploy.benchmark.dry_run import dry_run
    from lpdeploy.cli.progress import counting_progress
    from lpdeploy.servers.check import describe_forecast

    with counting_progress("tokenize") as on_tokenize:
        found = dry_run(model, config, **given, on_tokenize=on_tokenize)
    lines = [_describe_work(found)]
    if found.kept is None or found.layers is None:
        lines.append("Trials would choose what goes, before the first step.")
    else:
        kept = " and ".join(f"{n:,} of {of:,} {name}" for name, (n, of) in found.kept.items())
        after = found.parameters["after"]
        counts = f": {after:,} of {found.parameters['before']:,} parameters" if after else ""
        average = " on average" if config.scope == "global" else ""
        left, layers = found.layers
        subject = (
            "A layer would keep" if left == layers else f"{left} of {layers} layers stay, with"
        )
        lines += [f"{subject} {kept}{average}{counts}.", describe_forecast(model, config)]
    if found.least_seconds:
        lines.append(
            "The matrix products of the run alone would take "
            f"{_write_minutes(found.least_seconds)} on this device, at its speed now. Everything "
            "else comes on top, and so do trials and the predictions of a teacher."
        )
    print_result(found.to_json(), "\n".join(lines), as_json=as_json)
    written = "Nothing was written" + (" but cached tokens" if given["cache"] else "")
    log(f"{written}. Leave out --dry-run to start.")


def _write_minutes(seconds: float) -> str:
    return f"{round(seconds / 60):,} min" if seconds >= 60 else "less than a minute"


def _describe_work(found: Any) -> str:
    notes = [f"dropped as too long: {found.dropped:,}"] if found.dropped else []
    notes += [f"without the end of an answer: {found.cut:,}"] if found.cut else []
    rows = f"{found.rows:,} rows of tokens" + (f" ({'; '.join(notes)})" if notes else "")
    if not found.steps:
        return f"The run would prune in one shot, with {rows}."
    often = f", {found.passes:,.0f} passes over the rows" if found.passes >= _MANY_PASSES else ""
    return (
        f"The run would train on {rows} in {found.steps:,} steps{often}"
        f"{_describe_events(found.events)}."
    )


def _describe_events(events: Sequence[int]) -> str:
    if not events:
        return ""
    if events[-1] == 0:
        return ", and remove groups before the first one"
    steps = ", ".join(f"{step:,}" for step in events)
    return f", and remove groups after {'step' if len(events) == 1 else 'steps'} {steps}"


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
