"""`lpdeploy export`: write a model for an inference engine."""

from typing import Any

import click

from lpdeploy.cli.common import (
    EXPORTED,
    PRECISION,
    check_models,
    overwrite_option,
    print_result,
    say_next,
    shared_options,
    write_flags,
)
from lpdeploy.cli.types import COUNT, FOLDER, MODEL, Count
from lpdeploy.engines import list_exporting
from lpdeploy.machine import format_bytes

_HELP = """Export a RUN or MODEL for an inference engine.

A RUN must be compacted first. The export takes and returns the KV cache; batch size and lengths
stay dynamic. The engines are:

"""


def _describe_engines() -> str:
    lines = (write_flags(f"{engine.name}: {engine.summary}.") for engine in list_exporting())
    return "\n\n".join(lines)


def _describe_precisions() -> str:
    written = (f"{engine.name} {', '.join(engine.precisions)}" for engine in list_exporting())
    return f"Precision of the weights: {'; '.join(written)}."


@click.command("export", help=_HELP + _describe_engines())
@click.argument("model", type=MODEL, metavar="RUN|MODEL")
@click.option("--engine", type=EXPORTED, required=True, help="Engine that will run the model.")
@click.option("--precision", type=PRECISION, default="fp32", help=_describe_precisions())
@click.option(
    "--activations",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    help="Precision of activations with int8 and int4 weights; use fp16 or bf16 on a GPU.  "
    "[default: fp32]",
)
@click.option(
    "--block-size",
    type=COUNT,
    help="Number of weights that share a scale in int8 and int4.  [default: 32]",
)
@click.option(
    "--output",
    type=FOLDER,
    help="Write the export to this folder.  [default: RUN/ENGINE, RUN/ENGINE-unmerged or "
    "MODEL/ENGINE]",
)
@click.option("--max-batch", type=COUNT, help="Largest batch to serve.  [default: 8]")
@click.option(
    "--max-seq-len",
    type=Count(2),
    help="Longest prompt plus answer, in tokens.  [default: 2048, or the model's positions]",
)
@click.option(
    "--opset", type=COUNT, help="ONNX opset of the graph.  [default: what suits the engine]"
)
@click.option(
    "--unmerged", is_flag=True, help="Export RUN/unmerged, which keeps the adapter separate."
)
@overwrite_option
@shared_options()
def command(*, model: str, as_json: bool, **options: Any) -> None:
    """Export a run or a model for an engine."""
    check_models(model, unmerged=options["unmerged"])
    from lpdeploy.engines.export import export

    result = export(model, **options)
    contract = result.contract
    text = (
        f"{result.output}: {contract.engine} {contract.precision}, opset {contract.opset}, "
        f"{format_bytes(result.bytes)}, {result.seconds:.1f} s"
    )
    if contract.build is not None:
        build = contract.build
        text += (
            f"\nengine built in {build.build_seconds:.1f} s "
            f"by {build.library.name} {build.library.version}, cache {build.cache}"
        )
    print_result(result.to_json(), text, as_json=as_json)
    if options["output"] is None and not options["unmerged"]:
        say_next("verify", model, "--engine", contract.engine)
