"""`lpdeploy export`: the graph of a model for an inference engine."""

from pathlib import Path

import click

from lpdeploy.artifacts import format_bytes
from lpdeploy.cli.common import ENGINES, FOLDER, print_result, shared_options


@click.command("export")
@click.argument("target", metavar="RUN|MODEL")
@click.option("--engine", type=click.Choice(ENGINES[1:]), required=True)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16", "int8", "int4"]),
    default="fp32",
    help="int8 and int4, of weights alone, with --engine ort.",
)
@click.option(
    "--activations",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    help="Beside int8 and int4 weights; fp16 or bf16 for a GPU.  [default: fp32]",
)
@click.option(
    "--block-size", type=int, help="Weights that share a scale in int8 and int4.  [default: 32]"
)
@click.option(
    "--output", type=FOLDER, help="[default: RUN/ENGINE, RUN/ENGINE-unmerged or MODEL/ENGINE]"
)
@click.option("--max-batch", type=click.IntRange(min=1), default=8)
@click.option(
    "--max-seq-len", type=click.IntRange(min=2), help="[default: 2048, or the model's positions]"
)
@click.option("--opset", type=int, help="[default: what suits the engine]")
@click.option("--unmerged", is_flag=True, help="Export RUN/unmerged, LoRA as separate products.")
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
@shared_options()
def command(  # noqa: PLR0913 - one parameter an option
    *,
    target: str,
    engine: str,
    precision: str,
    activations: str | None,
    block_size: int | None,
    output: Path | None,
    max_batch: int,
    max_seq_len: int | None,
    opset: int | None,
    unmerged: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Export a RUN or a MODEL folder: KV cache in and out, dynamic batch, sequence and past.

    onnx is a graph of standard operators, for any runtime. ort is one of ONNX Runtime's own
    operators over a cache that is written in place: the fastest on a CPU, and what ONNX Runtime
    GenAI opens. trt is an engine of TensorRT or TensorRT-RTX: it admits --max-batch
    and --max-seq-len and no more, and runs on the kind of GPU and the version of the library that
    built it.
    """
    from lpdeploy.engines.export import export

    result = export(
        target,
        engine=engine,
        output=output,
        unmerged=unmerged,
        precision=precision,
        activations=activations,
        block_size=block_size,
        opset=opset,
        max_batch=max_batch,
        max_seq_len=max_seq_len,
        overwrite=overwrite,
    )
    text = (
        f"{result['output']}: {result['engine']} {result['precision']}, opset {result['opset']}, "
        f"{format_bytes(result['bytes'])}, {result['seconds']:.1f} s"
    )
    if "library" in result:
        library = result["library"]
        text += (
            f"\nengine built in {result['build_seconds']:.1f} s "
            f"by {library['name']} {library['version']}, cache {result['cache']}"
        )
    print_result(result, text, as_json=as_json)
