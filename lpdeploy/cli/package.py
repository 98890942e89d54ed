"""`lpdeploy package`: a folder that a server opens as it is."""

from pathlib import Path
from typing import Any

import click

from lpdeploy.cli.common import FOLDER, PRECISION, SERVED, TARGETS, print_result, shared_options
from lpdeploy.machine import format_bytes

_COUNT = click.IntRange(min=1)


@click.command("package")
@click.argument("model", metavar="RUN|MODEL")
@click.option("--target", type=click.Choice(TARGETS), required=True, help="The server.")
@click.option("--output", type=FOLDER, required=True, help="The folder to write.")
@click.option(
    "--precision",
    type=PRECISION,
    help="Of genai and llamacpp (which has no int4), and of triton.  [default: fp32; llamacpp: the "
    "checkpoint's]",
)
@click.option("--engine", type=SERVED, help="Of triton.  [default: ort]")
@click.option("--name", help="Of the models of triton.  [default: the name of DIR]")
@click.option(
    "--max-batch", type=_COUNT, help="Requests that triton decodes at once.  [default: 8]"
)
@click.option(
    "--gpu",
    type=click.IntRange(min=0),
    multiple=True,
    callback=lambda _context, _option, value: value or None,
    help="Of triton, may be repeated: one instance on each.  [default: the CPU]",
)
@click.option(
    "--activations",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    help="Of genai, beside int8 and int4 weights.",
)
@click.option("--block-size", type=_COUNT, help="Of genai: weights that share a scale.")
@click.option(
    "--max-seq-len", type=click.IntRange(min=2), help="Longest prompt and answer together."
)
@click.option("--tensor-parallel", type=_COUNT, help="GPUs that share the heads, of vllm.")
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
@shared_options()
def command(*, model: str, target: str, output: Path, as_json: bool, **options: Any) -> None:
    """Write the folder that a server opens as it is, with its command in a README.md.

    triton is a model repository of Triton, text in and text out over --engine ort or trt. genai is
    for ONNX Runtime GenAI, vllm for vLLM, transformers serve and SGLang, llamacpp a GGUF file for
    llama.cpp. Of a RUN it takes the compacted model.
    """
    from lpdeploy.servers.package import package

    result = package(model, kind=target, output=output, **options)
    size = f"{len(result['files'])} files, {format_bytes(result['bytes'])}"
    lines = [f"{output}: {size}, {result['seconds']:.1f} s", result["command"], *result["notes"]]
    print_result(result, "\n".join(lines), as_json=as_json)
