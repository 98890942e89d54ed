"""`lpdeploy prune`: Algorithm 1 on a model and data."""

import dataclasses
from pathlib import Path
from typing import Any

import click

from lpdeploy.artifacts import format_bytes
from lpdeploy.cli.common import FOLDER, NameChoice, log, print_result, shared_options
from lpdeploy.cli.targets import choose_ratios, take_target, target_options
from lpdeploy.criteria import CRITERIA
from lpdeploy.plan import SCHEDULES
from lpdeploy.pruning.options import PruneOptions
from lpdeploy.pruning.schedule import RAMPS

_DEFAULT = PruneOptions()
_SHARE = click.FloatRange(0, 1, max_open=True)
_COUNT = click.IntRange(min=1)
_LAYERS = click.IntRange(min=0)


@click.command("prune")
@click.argument("model")
@click.option("--data", required=True, metavar="SOURCE", help="File, folder or hub name.")
@click.option("--output", required=True, type=FOLDER, metavar="RUN", help="Folder of the run.")
@click.option("--ratio", type=_SHARE, default=_DEFAULT.ratio, help="Share of groups to remove.")
@click.option("--head-ratio", type=_SHARE, help="Share of the heads.  [default: --ratio]")
@click.option("--channel-ratio", type=_SHARE, help="Share of the channels.  [default: --ratio]")
@target_options
@click.option(
    "--criterion",
    type=NameChoice(CRITERIA),
    default=_DEFAULT.criterion,
    help="How groups are scored. "
    + " ".join(f"{name}: {criterion.help}." for name, criterion in CRITERIA.items()),
)
@click.option(
    "--score-form",
    type=click.Choice(["squared", "absolute"]),
    default=_DEFAULT.score_form,
    help="What is summed over a group.",
)
@click.option("--normalize", is_flag=True, help="Divide each Linear's scores by their L2 norm.")
@click.option(
    "--offload-gradients",
    is_flag=True,
    help="Keep the gradients of the weights in CPU memory, if the criterion needs them.",
)
@click.option(
    "--schedule",
    type=click.Choice(SCHEDULES),
    default=_DEFAULT.schedule,
    help="Prune and fine-tune together; prune once, then fine-tune; or prune only.",
)
@click.option(
    "--calibration-samples",
    type=_LAYERS,
    help="Rows scored before the first step.  [default: 128; 0 with --ramp authors or paper]",
)
@click.option("--epochs", type=_COUNT, default=_DEFAULT.epochs, help="Passes over the data.")
@click.option("--steps", type=_COUNT, help="Optimizer steps, instead of epochs.")
@click.option(
    "--batch-size",
    type=_COUNT,
    default=_DEFAULT.batch_size,
    help="Sequences a step, over all ranks.",
)
@click.option(
    "--micro-batch-size",
    type=_COUNT,
    default=_DEFAULT.micro_batch_size,
    help="Sequences a forward pass; divides the batch size.",
)
@click.option(
    "--seq-len", type=click.IntRange(min=2), default=_DEFAULT.seq_len, help="Tokens a sequence."
)
@click.option(
    "--lr", type=click.FloatRange(0, min_open=True), default=_DEFAULT.lr, help="Peak rate."
)
@click.option("--lr-warmup", type=_SHARE, default=_DEFAULT.lr_warmup, help="Share of the steps.")
@click.option(
    "--lr-hold",
    type=_SHARE,
    help="Share of the steps before the rate falls.  [default: by --ramp]",
)
@click.option(
    "--max-grad-norm",
    type=click.FloatRange(0, min_open=True),
    default=_DEFAULT.max_grad_norm,
    help="Clip gradients to this norm.",
)
@click.option("--lora-rank", type=_COUNT, default=_DEFAULT.lora_rank, help="Rank of A and B.")
@click.option(
    "--lora-alpha",
    type=click.FloatRange(0, min_open=True),
    default=_DEFAULT.lora_alpha,
    help="LoRA adds alpha / rank times B A.",
)
@click.option("--lora-dropout", type=_SHARE, default=_DEFAULT.lora_dropout, help="On LoRA's input.")
@click.option("--ema-decay", type=_SHARE, default=_DEFAULT.ema_decay, help="lambda of Eq. 11.")
@click.option(
    "--prune-every", type=_COUNT, default=_DEFAULT.prune_every, help="Steps between events."
)
@click.option(
    "--ramp",
    type=click.Choice(list(RAMPS)),
    default=_DEFAULT.ramp,
    help="How pruning is spread: mostly early, as the authors do, or evenly as in the paper.",
)
@click.option(
    "--warmup",
    type=_SHARE,
    help="Share of the steps before the first event.  [default: by --ramp]",
)
@click.option(
    "--cooldown",
    type=_SHARE,
    help="Share of the steps after the last event.  [default: by --ramp]",
)
@click.option(
    "--scope",
    type=click.Choice(["layer", "global"]),
    default=_DEFAULT.scope,
    help="Same widths in every layer (a stock checkpoint), or per-layer widths.",
)
@click.option("--protect-first", type=_LAYERS, default=0, help="Layers left whole at the input.")
@click.option("--protect-last", type=_LAYERS, default=0, help="Layers left whole at the output.")
@click.option("--round-to", type=_COUNT, default=_DEFAULT.round_to, help="Channels: multiples.")
@click.option(
    "--round-heads-to", type=_COUNT, default=_DEFAULT.round_heads_to, help="KV heads: multiples."
)
@click.option(
    "--removal",
    type=click.Choice(["cut", "mask"]),
    default=_DEFAULT.removal,
    help="Cut groups out at each event, or mask them until the end.",
)
@click.option(
    "--load-in",
    type=click.Choice(["8bit", "4bit"]),
    help="Quantise the frozen base while pruning; 4bit is masked, not cut.",
)
@click.option(
    "--shard",
    is_flag=True,
    help="Spread the base over the ranks (FSDP2), for one that fits no single GPU; it is masked, "
    "not cut.",
)
@click.option("--train-on-prompt", is_flag=True, help="Learn the prompts of instructions too.")
@click.option("--gradient-checkpointing", is_flag=True, help="Less memory, more time.")
@click.option("--compile", is_flag=True, help="torch.compile after the last event, for a GPU.")
@click.option(
    "--ignore-memory", is_flag=True, help="Start where memory will not suffice by the plan, too."
)
@click.option(
    "--checkpoint-every",
    type=_LAYERS,
    default=_DEFAULT.checkpoint_every,
    help="Steps between checkpoints; 0 for none.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "fp32", "bf16"]),
    default=_DEFAULT.dtype,
    help="auto: bf16 for a half-precision checkpoint on a GPU, else fp32.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default=_DEFAULT.device,
    help="auto: cuda where torch has one.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=_DEFAULT.seed,
    help="Of LoRA's start, the data order and dropout.",
)
@click.option(
    "--cache/--no-cache",
    default=True,
    help="Keep the tokens of SOURCE for later runs, in $LPDEPLOY_CACHE or the hub's own cache.",
)
@click.option("--resume", is_flag=True, help="Go on from the checkpoint in RUN.")
@click.option("--overwrite", is_flag=True, help="Replace the run in RUN.")
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
    """Prune MODEL while it fine-tunes with LoRA, and write a run."""
    asked = take_target(values)
    _choose_removal(values)
    try:
        options = PruneOptions(**values)
    except ValueError as error:
        raise click.UsageError(str(error)) from error

    from lpdeploy.cli.progress import counting_progress, training_progress
    from lpdeploy.pruning.ranks import leave_ranks
    from lpdeploy.pruning.run import prune
    from lpdeploy.servers.check import describe_forecast

    with counting_progress("tokenise") as on_tokenise, training_progress() as on_step:
        given: dict[str, Any] = {
            "model": model,
            "output": output,
            "data": data,
            "cache": cache,
            "overwrite": overwrite,
            "on_tokenise": on_tokenise,
        }
        target = None
        if asked is not None:
            options, target = choose_ratios(asked, options, resume=resume, **given)
        result = prune(
            **given,
            options=options,
            target=target,
            resume=resume,
            on_start=lambda: log(describe_forecast(model, options)),
            on_step=on_step,
            log=log,
        )
    leave_ranks()
    print_result(dataclasses.asdict(result), _describe(result), as_json=as_json)
    log(f"Next: lpdeploy compact {output}")


def _choose_removal(values: dict[str, Any]) -> None:
    """Mask a base that cannot be cut, where the user did not say how to remove."""
    source = click.get_current_context().get_parameter_source("removal")
    if source is not click.core.ParameterSource.DEFAULT:
        return
    if values["load_in"] == "4bit":
        values["removal"] = "mask"
        log("--load-in 4bit: groups are masked until the end, since nf4 weights cannot be cut.")
    elif values["shard"]:
        values["removal"] = "mask"
        log("--shard: groups are masked until the end, since sharded weights cannot be cut.")


def _describe(result: Any) -> str:
    achieved = result.achieved
    return (
        f"{result.run}: {achieved['heads']:.1%} of the heads, {achieved['channels']:.1%} of the "
        f"channels and {achieved['parameters']:.1%} of the parameters removed in {result.steps} "
        f"steps, {result.seconds:.0f} s, {format_bytes(result.peak_bytes)}; loss {result.loss:.3f}"
    )
