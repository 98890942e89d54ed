"""Progress on stderr: a bar on a terminal, and a line now and then in a log file."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lpdeploy.cli.common import is_first_rank, log
from lpdeploy.machine import format_bytes

LINE_SECONDS = 60.0
"""Time between two lines where there is no bar."""


class _Lines:
    """Says now and then how far something is, where no bar is shown.

    The first call says nothing: it is when the work begins. So does the first call for another text
    or task, which counts anew.
    """

    def __init__(self, description: str, *, shown: bool) -> None:
        self._description, self._shown = description, shown
        self._begun = self._last = 0.0
        self._before, self._done, self._total = 0, 0, 0

    def tell(self, done: int, total: int, more: str = "") -> None:
        """Say it, if the last line is old enough and something is left."""
        now = time.monotonic()
        if total != self._total or done < self._done:
            self._before, self._total, self._begun, self._last = done, total, now, now
        self._done = done
        if not self._shown or now - self._last < LINE_SECONDS or not self._before < done < total:
            return
        self._last = now
        left = (now - self._begun) * (total - done) / (done - self._before)
        log(
            f"{self._description}: {done:,} of {total:,}{more}, "
            f"about {max(1, round(left / 60)):,} min left"
        )


@contextmanager
def _open_progress(*columns: str) -> Iterator[Any]:
    """Yield a bar that is not shown before it is started, and is hidden at the end."""
    from rich import progress as bars
    from rich.console import Console

    console = Console(stderr=True)
    progress = bars.Progress(
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        *[bars.TextColumn(column) for column in columns],
        bars.TimeRemainingColumn(),
        console=console,
        disable=not (console.is_terminal and is_first_rank()),
    )
    try:
        yield progress
    finally:
        progress.stop()


@contextmanager
def training_progress() -> Iterator[Callable[[Any], None]]:
    """Yield a callback for ``StepInfo`` that shows losses, ratio, tokens/s and memory."""
    columns = (
        "loss {task.fields[loss]:.3f}",
        "removed {task.fields[ratio]:.1%}{task.fields[event]}",
        "{task.fields[tokens_per_s]:,.0f} tokens/s",
        "{task.fields[memory]}",
    )
    fields = {"loss": float("nan"), "ratio": 0.0, "event": "", "tokens_per_s": 0.0, "memory": ""}
    with _open_progress(*columns) as progress:
        task = progress.add_task("prune", total=None, **fields)
        lines = _Lines("prune", shown=progress.disable)

        def show(info: Any) -> None:
            own = {name: getattr(info, name) for name in ("loss", "ratio", "tokens_per_s")}
            memory = format_bytes(info.peak_bytes)
            if info.removed and info.loss_before is not None:
                own["event"] = f" (held-out loss {info.loss_before:.3f} to {info.loss_after:.3f})"
            progress.update(task, total=info.steps, completed=info.step, memory=memory, **own)
            progress.start()  # not earlier, because another bar may still be shown
            more = f" steps, loss {info.loss:.3f}, removed {info.ratio:.1%}"
            lines.tell(info.step, info.steps, more)

        yield show


@contextmanager
def counting_progress(description: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a callback ``(done, total)``; the bar is shown from the first call to the last."""
    with _open_progress() as progress:
        task = progress.add_task(description, total=None)
        lines = _Lines(description, shown=progress.disable)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)
            progress.start()
            lines.tell(done, total)
            if done >= total:
                progress.stop()

        yield show
