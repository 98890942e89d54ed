"""Progress bars on stderr; they are hidden if stderr is not a terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lpdeploy.cli.common import is_first_rank
from lpdeploy.machine import format_bytes


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

        def show(info: Any) -> None:
            own = {name: getattr(info, name) for name in ("loss", "ratio", "tokens_per_s")}
            memory = format_bytes(info.peak_bytes)
            if info.removed and info.loss_before is not None:
                own["event"] = f" (held-out loss {info.loss_before:.3f} to {info.loss_after:.3f})"
            progress.update(task, total=info.steps, completed=info.step, memory=memory, **own)
            progress.start()  # not earlier, because another bar may still be shown

        yield show


@contextmanager
def counting_progress(description: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a callback ``(done, total)``; the bar is shown from the first call to the last."""
    with _open_progress() as progress:
        task = progress.add_task(description, total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)
            progress.start()
            if done >= total:
                progress.stop()

        yield show
