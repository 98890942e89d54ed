"""What a stage ran on: the machine, versions of libraries, memory in use, and the time.

Standard library only.
"""

import functools
import importlib.metadata
import os
import platform
import resource
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lpdeploy import __version__

_LIBRARIES = (
    *("torch", "transformers", "peft", "accelerate", "bitsandbytes"),
    *("onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "lm_eval", "llama_cpp_python"),
)


def list_versions() -> dict[str, str]:
    """Return the versions of Python and of the installed libraries that shape a result."""
    return dict(_find_versions())


@functools.cache  # some milliseconds a library
def _find_versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "lpdeploy": __version__}
    for name in _LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a measurement was made on, with the versions, the date and the command.

    Attributes:
        cpu: Model of the processor.
        cores: Logical cores.
        threads: Threads that torch uses; None where torch was not loaded.
        gpu: Name of the CUDA device, or None.
        system: Operating system and its version.
        versions: Of Python and the libraries, see ``list_versions``.
        date: Now, in UTC (ISO 8601).
        command: The command line; empty where it is recorded elsewhere.
    """

    cpu: str
    cores: int | None
    threads: int | None
    gpu: str | None
    system: str
    versions: dict[str, str]
    date: str
    command: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object; without ``command`` where it is empty."""
        data = asdict(self)
        return data if self.command else {k: v for k, v in data.items() if k != "command"}


def describe_machine() -> Machine:
    """Describe this machine; a GPU and threads are known once torch has been imported."""
    torch = sys.modules.get("torch")
    return Machine(
        cpu=_cpu_name(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads() if torch else None,
        gpu=torch.cuda.get_device_name() if torch and torch.cuda.is_available() else None,
        system=platform.platform(),
        versions=list_versions(),
        date=now(),
        command=" ".join(["lpdeploy", *sys.argv[1:]]),
    )


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def now() -> str:
    """Return the current UTC time, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def measure_peak_bytes() -> int:
    """Return the peak memory so far: of the CUDA device where one is in use, else of the process.

    The process figure is its largest resident set (the libraries included) since it started.
    """
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def read_process_bytes(pid: int | None = None, *, peak: bool = False) -> int | None:
    """Return the memory of a process now, or its largest.

    Args:
        pid: Of the process; None for this one.
        peak: Return the largest so far, which the kernel keeps.

    Returns:
        Bytes; None where there is no /proc, or where the process has ended.
    """
    status = Path("/proc", "self" if pid is None else str(pid), "status")
    try:
        lines = status.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    name = "VmHWM:" if peak else "VmRSS:"
    found = (int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
    return next(found, None)


def format_bytes(count: float) -> str:
    """Write a number of bytes for people: 23.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
