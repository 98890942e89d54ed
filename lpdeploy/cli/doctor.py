"""`lpdeploy doctor`: what this machine and environment can do."""

import importlib.util

import click

from lpdeploy.cli.common import print_result, shared_options

# Module -> (extra that installs it, what it is for).
_OPTIONAL = {
    "bitsandbytes": ("quant", "--load-in 8bit and 4bit"),
    "llama_cpp": ("llamacpp", "package --target llamacpp in llama.cpp's smaller types"),
    "lm_eval": ("eval", "eval --tasks"),
    "onnxruntime": ("cpu", "running exported ONNX models"),
    "onnxruntime_genai": ("genai", "serving --engine ort exports with ONNX Runtime GenAI"),
    "tensorrt": ("trt", "building engines on the GPU that will run them"),
    "tensorrt_rtx": ("trt-rtx", "building engines for RTX cards on any machine"),
}


@click.command("doctor")
@shared_options(recipe=False)
def command(*, as_json: bool) -> None:
    """Show devices and libraries, and how to install what is missing."""
    import torch

    from lpdeploy.machine import describe_machine

    machine = describe_machine()
    missing = {
        name: f"pip install 'lpdeploy[{extra}]'"
        for name, (extra, _) in _OPTIONAL.items()
        if importlib.util.find_spec(name) is None
    }
    lines = [
        f"cpu      {machine.cpu}, {machine.cores} cores",
        f"gpu      {machine.gpu or 'none that torch can use'}",
        f"system   {machine.system}",
        *[f"{name:12} {version}" for name, version in machine.versions.items()],
        *[
            f"{name:12} missing; needed for {_OPTIONAL[name][1]}: {command}"
            for name, command in missing.items()
        ],
    ]
    shown = {**machine.to_json(), "cuda": torch.cuda.is_available()}
    print_result({"machine": shown, "missing": missing}, "\n".join(lines), as_json=as_json)
