"""The log of a run: a line of JSON for each step, whole or not there."""

import dataclasses
import errno
import hashlib
import os
from dataclasses import dataclass

from lpdeploy.artifacts import atomic_file
from lpdeploy.errors import ArtifactError
from lpdeploy.records import format_json, load_record_lines
from lpdeploy.run_folder import RunFolder

_FIX = "Delete that line, or the file."


@dataclass(frozen=True)
class StepInfo:
    """What one optimizer step did.

    Attributes:
        step: 1-based; 0 is the calibration before the first.
        steps: Of the whole run.
        loss: Mean loss a token of the batch in nats, before the step: the cross-entropy, mixed
            with the divergence from the unpruned model where the run distils.
        ratio: Share of groups that the schedule says are gone after the step.
        lr: Learning rate of the step.
        tokens_per_s: Tokens of the batch (padding included) over the step's time.
        seconds: Time of the step.
        scoring_seconds: Part of it that scoring took.
        cutting_seconds: Part of it that choosing and removing groups took.
        peak_bytes: Peak memory so far, of the device or the process.
        removed: Whether groups were removed after the step.
        padding: Share of padding among the tokens of the batch.
        loss_before: Mean loss a token of held-out rows before groups were removed, in nats; None
            if none were.
        loss_after: Likewise, after.
        valid_loss: Mean cross-entropy of the held-out texts after the step, in nats per token;
            None if it was not measured there.
    """

    step: int
    steps: int
    loss: float
    ratio: float
    lr: float
    tokens_per_s: float
    seconds: float
    scoring_seconds: float
    cutting_seconds: float
    peak_bytes: int
    removed: bool
    padding: float = 0.0
    loss_before: float | None = None
    loss_after: float | None = None
    valid_loss: float | None = None


def append_log(run: RunFolder, info: StepInfo) -> None:
    """Add the line of a step.

    Raises:
        OSError: It cannot be written; no part of it is left.
    """
    # One write to a file opened for appending: a kill leaves whole lines only.
    line = format_json(dataclasses.asdict(info), indent=None).encode()
    handle = os.open(run.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(handle).st_size
        if os.write(handle, line) < len(line):  # the disk took a part: it is full
            os.ftruncate(handle, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(run.log))
    finally:
        os.close(handle)


def trim_log(run: RunFolder, done: int, *, sha256: str | None = None) -> None:
    """Drop the lines of steps after ``done``, which a resumed run does again.

    Args:
        run: Where the log lies, if it was not deleted.
        done: The last step that was done.
        sha256: Hash of the lines that stay; None if it is not known.

    Raises:
        ArtifactError: A line is damaged or was changed.
    """
    path = run.log
    if path.is_file():
        found = load_record_lines(StepInfo, path, fix=_FIX)
        text = "".join(f"{line}\n" for line, info in found if info.step <= done).encode()
        if sha256 is not None and hashlib.sha256(text).hexdigest() != sha256:
            raise ArtifactError(
                f"'{path}' has changed since the checkpoint was saved. Restore it, or delete it."
            )
        with atomic_file(path) as temporary:
            temporary.write_bytes(text)


def load_log(run: RunFolder) -> list[StepInfo]:
    """Read what every step did; nothing if no step has finished.

    Raises:
        ArtifactError: A line is damaged.
    """
    if not run.log.is_file():
        return []
    return [info for _, info in load_record_lines(StepInfo, run.log, fix=_FIX)]


def load_losses(run: RunFolder, done: int) -> list[float]:
    """Return the losses of the steps up to ``done``, in their order.

    A calibration's loss is that of the unpruned model: it counts where no step follows.

    Raises:
        ArtifactError: A line is damaged.
    """
    losses = {info.step: info.loss for info in load_log(run) if info.step <= done}
    return [loss for step, loss in losses.items() if step or done == 0]
