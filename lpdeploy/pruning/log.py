"""The log of a run: a line of JSON for each step, whole or not there."""

import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any

from lpdeploy.artifacts import atomic_file
from lpdeploy.errors import ArtifactError
from lpdeploy.pruning.training import StepInfo
from lpdeploy.run_folder import RunFolder


def append_log(run: RunFolder, info: StepInfo) -> None:
    """Add the line of a step.

    Raises:
        OSError: It cannot be written; no part of it is left.
    """
    # One write to a file opened for appending: a kill leaves whole lines only.
    line = (json.dumps(dataclasses.asdict(info)) + "\n").encode()
    handle = os.open(run.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(handle).st_size
        if os.write(handle, line) < len(line):  # the disk took a part: it is full
            os.ftruncate(handle, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(run.log))
    finally:
        os.close(handle)


def trim_log(run: RunFolder, done: int) -> None:
    """Drop the lines of steps after ``done``, which a resumed run does again.

    Raises:
        ArtifactError: A line is damaged.
    """
    path = run.log
    if path.is_file():
        lines = [line for line, info in _read(path) if info["step"] <= done]
        with atomic_file(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def load_losses(run: RunFolder, done: int) -> list[float]:
    """Return the losses of the steps up to ``done``, in their order.

    A calibration's loss is that of the unpruned model: it counts where no step follows.

    Raises:
        ArtifactError: A line is damaged.
    """
    path = run.log
    infos = [info for _, info in _read(path)] if path.is_file() else []
    losses = {info["step"]: info["loss"] for info in infos if info["step"] <= done}
    return [loss for step, loss in losses.items() if step or done == 0]


def _read(path: Path) -> list[tuple[str, dict[str, Any]]]:
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    if not text.endswith("\n"):  # what a machine that lost its power may leave
        lines = lines[:-1]
    try:
        return [(line, json.loads(line)) for line in lines]
    except json.JSONDecodeError as error:
        raise ArtifactError(
            f"'{path}' has a line that is not valid JSON ({error}). Delete that line, or the file."
        ) from error
