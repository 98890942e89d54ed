"""`lpdeploy compact`: write the dense pruned model of a run."""

from pathlib import Path
from typing import Any

import click

from lpdeploy.cli.common import (
    base_option,
    overwrite_option,
    print_result,
    say_next,
    shared_options,
)
from lpdeploy.cli.types import COUNT, FOLDER, RUN
from lpdeploy.engines import ORT
from lpdeploy.machine import format_bytes


@click.command("compact")
@click.argument("run", type=RUN)
@click.option(
    "--keep-adapter",
    is_flag=True,
    help="Write the pruned base with a separate PEFT adapter, instead of merging LoRA.",
)
@click.option(
    "--output",
    type=FOLDER,
    help="Write the model to this folder.  [default: RUN/model, or RUN/unmerged with "
    "--keep-adapter]",
)
@click.option(
    "--max-shard-mb", type=COUNT, default=1000, help="Largest size of a weight file, in MB."
)
@base_option
@overwrite_option
@shared_options()
def command(*, run: Path, max_shard_mb: int, as_json: bool, **options: Any) -> None:
    """Write the dense pruned model of RUN, with LoRA merged.

    Removed heads and channels are cut out of the base model. If all layers have the same widths,
    AutoModelForCausalLM loads the result without custom code.
    """
    from lpdeploy.models.compact import compact

    result = compact(run, max_shard_bytes=max_shard_mb * 1_000_000, **options)
    print_result(result.to_json(), _describe(result), as_json=as_json)
    if options["output"] is None and not options["keep_adapter"]:
        say_next("export", run, "--engine", ORT.name)


def _describe(result: Any) -> str:
    record = result.record
    sizes, counts = record.bytes, record.parameters
    return (
        f"{result.model}: {record.architecture} with {counts['after']:,} of {counts['before']:,} "
        f"parameters ({format_bytes(sizes['after'])} of {format_bytes(sizes['before'])}), "
        f"written in {result.seconds:.1f} s"
    )
