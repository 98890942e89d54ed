"""Libraries that lpdeploy works without: what each is for, and whether it is there.

Standard library only.
"""

import importlib.metadata
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Extra:
    """An extra of lpdeploy.

    Attributes:
        name: As in ``pip install 'lpdeploy[name]'``.
        packages: What pip installs for it, the most telling first.
        purpose: What it is for.
        needs_gpu: Whether it is of no use without an NVIDIA GPU.
    """

    name: str
    packages: tuple[str, ...]
    purpose: str
    needs_gpu: bool = False

    @property
    def install(self) -> str:
        """The command that installs it."""
        return f"pip install 'lpdeploy[{self.name}]'"

    def find_version(self) -> str | None:
        """Return the version of the first package; None unless all of them are installed."""
        try:
            versions = [importlib.metadata.version(name) for name in self.packages]
        except importlib.metadata.PackageNotFoundError:
            return None
        return versions[0]

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON object, with what is installed here."""
        return {**asdict(self), "version": self.find_version(), "install": self.install}


EXTRAS = (
    Extra("cpu", ("onnxruntime",), "run the exports of onnx and ort on a CPU"),
    Extra(
        "gpu", ("onnxruntime-gpu",), "run them on an NVIDIA GPU, in place of cpu", needs_gpu=True
    ),
    Extra("genai", ("onnxruntime-genai",), "run the package for ONNX Runtime GenAI"),
    Extra(
        "trt",
        ("tensorrt",),
        "build and run engines on the GPU that will serve them",
        needs_gpu=True,
    ),
    Extra("trt-rtx", ("tensorrt-rtx",), "build engines for RTX cards, on any machine"),
    Extra("gguf", ("gguf",), "package a model for llama.cpp"),
    Extra("llamacpp", ("llama-cpp-python",), "package a model in llama.cpp's smaller types"),
    Extra("serve", ("fastapi", "uvicorn", "openai"), "serve the OpenAI API on this machine"),
    Extra("eval", ("lm-eval",), "measure accuracy on the tasks of lm-eval"),
    Extra("quant", ("bitsandbytes",), "keep the base in 8 or 4 bits while it is pruned"),
)
