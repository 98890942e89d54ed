"""The errors a user can cause or meet: one to three sentences that end with the fix."""

import errno
import os
import re

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C ended, or another signal that asks a program to end."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
# What numpy says of a write that the disk took a part of, without an errno.
_LONGEST_QUOTE = 300
_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written|problem writing element \d+ to file")


class LpdeployError(Exception):
    """Base of every error that a command prints as one line and exits 1 for.

    A message may quote a name from a broken file. What cannot be printed in a line is escaped.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


class RecipeError(LpdeployError):
    """A recipe file that cannot be read, or names an unknown command or option."""


class OptionError(LpdeployError):
    """An option that is wrong whatever the model is; a command exits 2 for it."""


class ArtifactError(LpdeployError):
    """A model, run or exported folder that is missing, in the way, changed or unusable."""


class DiskFullError(ArtifactError):
    """A file or folder for which there is no space. What was there before is unchanged."""


class RunInUseError(LpdeployError):
    """A run that another process is reading or writing."""


class DataError(LpdeployError):
    """A data source that cannot be read or holds nothing usable."""


class MissingDependencyError(LpdeployError):
    """An optional library that the asked-for work needs is not installed."""


class NonFiniteError(LpdeployError):
    """A loss or gradient became NaN or infinite."""


class RankLostError(LpdeployError):
    """Another process of a run with several is gone or does not answer."""


class OtherRankError(LpdeployError):
    """An error that every rank meets and another rank reports. Nothing needs to be said here."""


class RunEndedError(LpdeployError):
    """A run was told to end before it was complete; its message ends with how to go on."""

    SENTENCE = "The run was told to end."
    HINT = "Go on with `resume=True`."


class ParityError(LpdeployError):
    """Two stages that must compute the same thing do not."""


def quote_error(error: BaseException) -> str:
    """Write what a library says as part of a sentence: its first line, without a full stop."""
    lines = [" ".join(line.split()) for line in str(error).replace("`", "'").splitlines()]
    lines = [line for line in lines if line]
    said = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
    return said[:_LONGEST_QUOTE].rstrip(".") or type(error).__name__


def is_disk_full(error: BaseException) -> bool:
    """Tell whether a write failed for want of space, or of a file's permitted size."""
    if getattr(error, "errno", None) in _FULL:
        return True
    said = str(error)  # other libraries have the system's number, if at all, in their text only
    return bool(_SHORT_WRITE.search(said)) or any(
        f"(os error {number})" in said for number in _FULL
    )


def describe_os_error(error: OSError) -> str:
    """Say in one or two sentences what the system refused, and what to do."""
    name = error.filename
    named = f" '{os.fspath(name)}'" if isinstance(name, str | os.PathLike) else ""
    reason = error.strerror or str(error)
    if is_disk_full(error):
        return f"There is no space left to write{named}. Free some, and run the command again."
    if error.errno in _NOT_WRITABLE:
        return f"Cannot use{named}: {reason}. Use a folder that you may write to."
    return f"Cannot use{named}: {reason}." if named else f"{reason}."
