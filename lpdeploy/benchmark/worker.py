"""One process an engine: its threads and its memory are its own while it is timed."""

import gc
import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from lpdeploy.benchmark.limits import LimitsProbe
from lpdeploy.benchmark.variants import Variant
from lpdeploy.engines.runner import Runner
from lpdeploy.engines.torch.runner import load_torch_runner
from lpdeploy.environment import ignore_interrupts, quieten_libraries
from lpdeploy.errors import LpdeployError
from lpdeploy.machine import read_process_bytes


@dataclass(frozen=True)
class Workload:
    """What is timed.

    Attributes:
        tokens: Prompt tokens of a prefill; the paper times 2,048.
        decode: Tokens decoded one by one after the prompt; 0 for none.
        batch: Rows.
        repeats: Trials of each variant; the paper takes 100.
    """

    tokens: int = 2048
    decode: int = 0
    batch: int = 1
    repeats: int = 100


class Loaded(NamedTuple):
    """What a runner says of itself, and what loading it took.

    Attributes:
        precision: What it computes in.
        max_positions: Longest past + present in tokens.
        bytes: Memory that loading added to the process; None where that cannot be told.
    """

    precision: str
    max_positions: int
    bytes: int | None


class Timing(NamedTuple):
    """One trial.

    Attributes:
        seconds: Of one prefill, or of one decoded token.
        bytes: Memory that it took for a while; None where that cannot be told.
    """

    seconds: float
    bytes: int | None


class TimedRunner:
    """A runner with what it is timed on."""

    def __init__(self, runner: Runner, *, device: str) -> None:
        self.runner = runner
        self._device = device

    def time(self, workload: Workload, phase: str) -> Timing:
        """Run one trial of ``prefill`` or ``decode``."""
        generator = torch.Generator().manual_seed(0)
        shape = (workload.batch, workload.tokens)
        ids = torch.randint(self.runner.vocab_size, shape, generator=generator).to(self._device)
        mask = torch.ones_like(ids)
        if phase == "prefill":
            return time_work(lambda: self._prefill(ids, mask), device=self._device)
        past = self._prefill(ids, mask, reserve=workload.decode).past
        timing = time_work(
            lambda: self._decode(ids[:, -1:], mask, past, workload.decode), device=self._device
        )
        return Timing(timing.seconds / workload.decode, timing.bytes)

    def _prefill(self, ids: Tensor, mask: Tensor, *, reserve: int = 0) -> Any:
        return self.runner.forward(ids, attention_mask=mask, last_only=True, reserve=reserve)

    def _decode(self, token: Tensor, mask: Tensor, past: Any, steps: int) -> None:
        length = mask.shape[1]
        mask = torch.cat([mask, torch.ones_like(token).expand(-1, steps)], dim=1)
        for step in range(1, steps + 1):
            output = self.runner.forward(
                token, attention_mask=mask[:, : length + step], past=past, last_only=True
            )
            past = output.past


def time_work(work: Callable[[], Any], *, device: str) -> Timing:
    """Time something: by events on a GPU, by the clock on a CPU."""
    reset_peak(device)
    before = read_bytes(device)
    if device == "cpu":
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
    else:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize(device)
        seconds = begin.elapsed_time(end) / 1e3
    peak = read_bytes(device, peak=True)
    return Timing(seconds, None if before is None or peak is None else max(0, peak - before))


def reset_peak(device: str) -> None:
    """Let the peak that ``read_bytes`` tells begin anew, where the system can."""
    gc.collect()  # garbage freed later would take time, and hide as much memory of what follows
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:  # not Linux, or not allowed: then there is no peak of one trial
        return


def read_bytes(device: str, *, peak: bool = False) -> int | None:
    """Return the memory of this process, or its peak since the last reset; None if unknown."""
    if device != "cpu":  # what torch allocates; other engines keep their own books
        count = torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated
        return int(count(device))
    return read_process_bytes(peak=peak)


def load_timed(variant: Variant) -> tuple[TimedRunner, Loaded]:
    """Load one variant in this process."""
    gc.collect()
    before = read_bytes(variant.device)
    if variant.load is None:
        runner: Runner = load_torch_runner(
            variant.folder, device=variant.device, adapter=variant.adapter
        )
    else:
        runner = variant.load(variant.exported, device=variant.device)
    # A checkpoint may be mapped from its file: its pages are there once they have been read.
    runner.forward(torch.zeros(1, 2, dtype=torch.int64), attention_mask=torch.ones(1, 2).long())
    gc.collect()
    after = read_bytes(variant.device)
    added = None if before is None or after is None else max(0, after - before)
    loaded = Loaded(runner.precision, runner.max_positions, added)
    return TimedRunner(runner, device=variant.device), loaded


_Answer = Callable[..., Any]
Served = tuple[Any, _Answer]
"""What a worker says of what it has loaded, and what it answers a call with."""


def load_all(variants: Sequence[Variant]) -> Served:
    """Load the variants of one engine; describes each by ``Loaded``."""
    pairs = [load_timed(variant) for variant in variants]

    def answer(index: int, workload: Workload, phase: str) -> Timing:
        return pairs[index][0].time(workload, phase)

    return [loaded for _, loaded in pairs], answer


def build_probe(device: str, precision: str) -> Served:
    """Build the probe of the machine's limits; describes what each of its works does."""
    works = LimitsProbe(device=device, precision=precision)

    def answer(_index: int, _workload: Workload, work: str) -> Timing:
        return time_work(lambda: works.run(work), device=device)

    return works.units, answer


class Worker:
    """A process that holds what is timed of one engine.

    It does nothing until it is asked, and answers one call at a time, so that the caller decides
    which of several workers is timed next.

    Attributes:
        described: What was loaded says of itself.
    """

    def __init__(self, load: Callable[[], Served]) -> None:
        """Start the process; ``load`` is called in it, and must be a name of a module."""
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, load), daemon=True)
        with ignore_interrupts():
            self._process.start()
        other.close()
        try:
            self.described = self._receive()
        except BaseException:
            self._process.terminate()
            raise

    def time(self, index: int, workload: Workload, phase: str) -> Timing:
        """Run one trial of one variant.

        Raises:
            LpdeployError: It failed there, or the process has died.
        """
        return self.call(index, workload, phase)

    def call(self, *arguments: Any) -> Any:
        """Ask for one answer of whatever kind.

        Raises:
            LpdeployError: It failed there, or the process has died.
        """
        self._connection.send(arguments)
        return self._receive()

    def _receive(self) -> Any:
        try:
            answer = self._connection.recv()
        except EOFError:
            self._process.join(timeout=10)
            raise LpdeployError(
                f"The process that is timed ended with code {self._process.exitcode}, perhaps for "
                "want of memory. Time fewer models or engines at once."
            ) from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._connection.close()  # its next reading ends it
        self._process.join(timeout=10 if error is None else 0)
        if self._process.is_alive():
            self._process.terminate()


def _serve(connection: Connection, load: Callable[[], Served]) -> None:
    quieten_libraries()  # as in the command that started it
    try:
        described, answer = load()
        connection.send(described)
        gc.collect()
        gc.disable()  # a collection in the middle would hit one trial alone
        while True:
            connection.send(answer(*connection.recv()))
            gc.collect()
    except (EOFError, ConnectionError, KeyboardInterrupt):
        return
    except LpdeployError as error:
        connection.send(LpdeployError(str(error)))
