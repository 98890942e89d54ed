"""`lpdeploy compact`: the dense pruned model of a run."""

from pathlib import Path
from typing import Any

import click

from lpdeploy.cli.common import FOLDER, RUN, print_result, shared_options
from lpdeploy.machine import format_bytes


@click.command("compact")
@click.argument("run", type=RUN)
@click.option("--keep-adapter", is_flag=True, help="Leave LoRA beside the pruned base.")
@click.option("--output", type=FOLDER, help="[default: RUN/model, or RUN/unmerged]")
@click.option(
    "--max-shard-mb", type=click.IntRange(min=1), default=1000, help="Size of a weight file."
)
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
@shared_options()
def command(
    *,
    run: Path,
    keep_adapter: bool,
    output: Path | None,
    max_shard_mb: int,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Cut RUN's base, merge LoRA, and write a stock checkpoint."""
    from lpdeploy.models.compact import compact

    result = compact(
        run,
        output=output,
        keep_adapter=keep_adapter,
        max_shard_bytes=max_shard_mb * 1_000_000,
        overwrite=overwrite,
    )
    print_result(result.to_json(), _describe(result), as_json=as_json)


def _describe(result: Any) -> str:
    record = result.record
    sizes, counts = record.bytes, record.parameters
    return (
        f"{result.model}: {record.architecture}, {counts['after']:,} of {counts['before']:,} "
        f"parameters, {format_bytes(sizes['after'])} of {format_bytes(sizes['before'])}, "
        f"{result.seconds:.1f} s"
    )
