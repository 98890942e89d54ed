"""The C library's heap on a CPU, set so that the hole a tensor leaves fits the next one.

A tensor begins at a multiple of 64 bytes. glibc puts the few bytes before it into caches of small
chunks, from which they go to small objects instead of back to the hole, once the tensor is freed;
the next tensor of its size no longer fits there, and the heap grows far beyond what lives in it.
Without these caches it grows less. They can only be left out when a process starts.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lpdeploy.environment import set_variable

_NAME, _CACHE = "GLIBC_TUNABLES", "glibc.malloc.tcache_count"
_SETTINGS = f"{_CACHE}=0:glibc.malloc.mxfast=0"


def is_tight() -> bool:
    """Tell whether this process was started without the caches."""
    return f"{_CACHE}=0" in os.environ.get(_NAME, "").split(":")


@contextmanager
def tighten_heap() -> Iterator[None]:
    """Let processes that start meanwhile do without the caches, where they are glibc's."""
    before = os.environ.get(_NAME)
    tight = f"{before}:{_SETTINGS}" if before else _SETTINGS
    with set_variable(_NAME, tight if _can_tighten() else None):
        yield


def restart_tight() -> None:
    """Start this very command again, in this process, without the caches; return if they may stay.

    To be called first of all, before anything was imported that takes time or opened that is lost.
    """
    if not _can_tighten():
        return
    with tighten_heap():
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - ourselves


def _can_tighten() -> bool:
    """Whether it matters here, and the user has not decided already."""
    glibc = sys.platform == "linux" and "glibc" in (os.confstr("CS_GNU_LIBC_VERSION") or "")
    decided = _CACHE in os.environ.get(_NAME, "")
    # On a GPU, torch has an allocator of its own.
    return glibc and not decided and not Path("/dev/nvidiactl").exists()
