"""`lpdeploy package`: write a ready-to-serve folder for an inference server."""

from pathlib import Path
from typing import Any

import click

from lpdeploy.cli.common import (
    PACKED_PRECISION,
    SERVED,
    TARGET,
    check_models,
    overwrite_option,
    print_result,
    shared_options,
    write_flags,
)
from lpdeploy.cli.types import COUNT, FOLDER, MODEL, Count
from lpdeploy.machine import format_bytes


@click.command("package")
@click.argument("model", type=MODEL, metavar="RUN|MODEL")
@click.option("--target", type=TARGET, required=True, help="Server that will load the folder.")
@click.option("--output", type=FOLDER, required=True, help="Write the package to this folder.")
@click.option(
    "--precision",
    type=PACKED_PRECISION,
    help="Precision of the weights. triton and genai take those of an export, vllm fp8, and "
    "llamacpp all but int4 and fp8.  [default: fp32; for llamacpp and vllm that of the checkpoint]",
)
@click.option("--engine", type=SERVED, help="Engine that triton runs.  [default: ort]")
@click.option(
    "--name",
    help="Name of the model in triton's repository.  [default: the last part of --output]",
)
@click.option(
    "--max-batch", type=COUNT, help="Number of requests that triton decodes at once.  [default: 8]"
)
@click.option(
    "--gpu",
    type=Count(0),
    multiple=True,
    callback=lambda _context, _option, value: value or None,
    help="Start a triton instance on this GPU. May be repeated.  [default: the CPU]",
)
@click.option(
    "--activations",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    help="Precision of activations with int8 and int4 weights, for genai.",
)
@click.option("--block-size", type=COUNT, help="Number of weights that share a scale, for genai.")
@click.option("--max-seq-len", type=Count(2), help="Longest prompt plus answer, in tokens.")
@click.option(
    "--tensor-parallel", type=COUNT, help="Number of GPUs that share the heads, for vllm."
)
@overwrite_option
@shared_options()
def command(*, model: str, target: str, output: Path, as_json: bool, **options: Any) -> None:
    """Write a ready-to-serve folder for an inference server.

    The README.md in the folder shows the command that starts the server. A RUN must be compacted
    first. The targets are:

    triton: a Triton model repository that takes and returns text, with --engine ort or trt.

    genai: a folder for ONNX Runtime GenAI.

    vllm: a folder for vLLM, transformers serve and SGLang.

    llamacpp: a GGUF file for llama.cpp.
    """
    check_models(model)
    from lpdeploy.servers.package import package

    result = package(model, kind=target, output=output, **options)
    size = f"{len(result.files)} files, {format_bytes(result.bytes)}"
    lines = [
        f"{output}: {size}, {result.seconds:.1f} s",
        result.command,
        *map(write_flags, result.notes),
    ]
    print_result(result.to_json(), "\n".join(lines), as_json=as_json)
