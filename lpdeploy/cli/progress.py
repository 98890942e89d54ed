"""Progress on stderr: a bar on a terminal, and a line now and then in a log file."""

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lpdeploy.cli.common import is_first_rank, log
from lpdeploy.machine import format_bytes

LINE_SECONDS = 60.0
"""Time between two lines where there is no bar."""
_SPARKS = "▁▂▃▄▅▆▇█"
_SPARK_STEPS = 40


class _Lines:
    """Says now and then how far something is, where no bar is shown.

    The first call says nothing: it is when the work begins. So does the first call for another text
    or task, which counts anew.
    """

    def __init__(self, description: str, *, shown: bool) -> None:
        self.description, self._shown = description, shown
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
            f"{self.description}: {done:,} of {total:,}{more}, "
            f"about {max(1, round(left / 60)):,} min left"
        )


@contextmanager
def _open_progress(*columns: str, below: Sequence[str] = ()) -> Iterator[Any]:
    """Yield a bar that is not shown before it is started, and is hidden at the end.

    Args:
        columns: What follows the count, with the fields of a task.
        below: Lines under the bar, as they are at the moment.
    """
    from rich import progress as bars
    from rich.console import Console
    from rich.text import Text

    class Bars(bars.Progress):
        def get_renderables(self) -> Iterator[Any]:
            yield from super().get_renderables()
            yield from map(Text, below)

    console = Console(stderr=True)
    progress = Bars(
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
    """Yield a callback for ``StepInfo`` that shows the loss, what is gone, speed and memory."""
    columns = (
        "loss {task.fields[loss]:.3f}",
        "{task.fields[tokens_per_s]:,.0f} tokens/s",
        "{task.fields[memory]}",
    )
    fields = {"loss": float("nan"), "tokens_per_s": 0.0, "memory": ""}
    below: list[str] = []
    with _open_progress(*columns, below=below) as progress:
        task = progress.add_task("prune", total=None, **fields)
        lines = _Lines("prune", shown=progress.disable)
        losses: deque[float] = deque(maxlen=_SPARK_STEPS)
        last: dict[str, str] = {}

        def show(info: Any) -> None:
            own = {name: getattr(info, name) for name in ("loss", "tokens_per_s")}
            memory = format_bytes(info.peak_bytes)
            losses.append(info.loss)
            last.update(_describe_state(info))
            below[:] = [f"loss {draw_sparkline(losses)}  {'; '.join(last.values())}"]
            progress.update(task, total=info.steps, completed=info.step, memory=memory, **own)
            progress.start()  # not earlier, because another bar may still be shown
            more = [f" steps, loss {info.loss:.3f}", *last.values()]
            lines.tell(info.step, info.steps, ", ".join(more))

        yield show


def _describe_state(info: Any) -> dict[str, str]:
    """Return what a step has to say of the model, beside its loss; what it does not, stays."""
    found = {}
    if info.achieved is not None:
        gone = {name: share for name, share in info.achieved.items() if share and name != "groups"}
        shares = ", ".join(f"{share:.1%} of the {name}" for name, share in gone.items())
        found["removed"] = f"removed {shares or 'nothing yet'}"
    if info.removed and info.loss_before is not None:
        change = f"held-out loss {info.loss_before:.3f} to {info.loss_after:.3f}"
        found["event"] = f"event after step {info.step}: {change}"
    if info.valid_loss is not None:
        found["valid"] = f"valid loss {info.valid_loss:.3f} after step {info.step}"
    return found


def draw_sparkline(values: Collection[float]) -> str:
    """Draw numbers as a line of blocks, from the lowest at the bottom to the highest."""
    low, high = min(values), max(values)
    scale = (len(_SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_SPARKS[round((value - low) * scale)] for value in values)


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


@contextmanager
def part_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yield a callback ``(part, done, total)``; where total is 0, the bar only moves."""
    with _open_progress() as progress:
        task = progress.add_task("", total=None)
        lines = _Lines("", shown=False)

        def show(part: str, done: int, total: int) -> None:
            nonlocal lines
            if lines.description != part:
                lines = _Lines(part, shown=progress.disable)
                progress.reset(task, description=part)
            progress.update(task, completed=done, total=total or None)
            progress.start()
            lines.tell(done, total)

        yield show
