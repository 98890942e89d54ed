"""llama.cpp's own quantizer, which makes small types of a GGUF file in a large one."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lpdeploy.errors import LpdeployError, MissingDependencyError

_FAILED = "failed to quantize: "


def load_quantizer(precision: str) -> Any:
    """Import the library.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        import llama_cpp
    except ImportError as error:
        raise MissingDependencyError(
            f"llama-cpp-python is not installed; `precision={precision}` needs its quantizer. "
            "Install with: pip install 'lpdeploy[llamacpp]'."
        ) from error
    return llama_cpp


def quantize_gguf(library: Any, source: Path, target: Path, *, precision: str) -> None:
    """Write a GGUF file once more, in smaller types.

    Args:
        library: As ``load_quantizer`` returns it.
        source: With matrices in F32, F16 or BF16.
        target: Where to. It may be incomplete where the disk is full, since llama.cpp does not
            look: read it before you trust it.
        precision: One of ``K_QUANTS`` or ``SMALL_BLOCKS``.

    Raises:
        LpdeployError: llama.cpp does not quantize the file.
    """
    settings = library.llama_model_quantize_default_params()
    settings.ftype = getattr(library, f"LLAMA_FTYPE_MOSTLY_{precision.upper()}")
    settings.nthread = torch.get_num_threads()
    paths = [os.fsencode(path) for path in (source, target)]
    with _catch_log(library) as said:
        failed = library.llama_model_quantize(*paths, ctypes.byref(settings))
    if failed:
        reason = "".join(said).rpartition(_FAILED)[2].strip() or "it does not say why"
        raise LpdeployError(
            f"llama.cpp cannot write `precision={precision}` of this model: {reason}. Use "
            "`precision=q8_0`, or another version of llama-cpp-python."
        )


@contextmanager
def _catch_log(library: Any) -> Iterator[list[str]]:
    """Collect what llama.cpp would write to standard error, some lines a tensor."""
    said: list[str] = []
    before, data = library.llama_log_callback(), ctypes.c_void_p()
    library.llama_log_get(ctypes.byref(before), ctypes.byref(data))

    def collect(_level: int, text: bytes, _data: object) -> None:
        said.append(text.decode(errors="replace"))

    catch = library.llama_log_callback(collect)  # named, since llama.cpp keeps the address alone
    library.llama_log_set(catch, None)
    try:
        yield said
    finally:
        library.llama_log_set(before, data)
