"""Files that stages hand over: written whole or not at all, and hashed.

Standard library only. Every writer makes a temporary sibling and renames it, so a run that is
killed leaves no half-written file under its final name. ``folders.py`` does the same for folders,
and keeps a record of the files in them.
"""

import hashlib
import os
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lpdeploy.errors import ArtifactError, DiskFullError, is_disk_full
from lpdeploy.records import format_json

_RECORDS = ("lpdeploy.json", ".lpdeploy.json")  # which hold hashes themselves
_BLOCK_BYTES = 1 << 22
# File systems count time in steps; two writes within one of them cannot be told apart.
_STEP_NS = 1_000_000_000
_hashes: dict[tuple[int, ...], str] = {}


def temporary_path(path: Path) -> Path:
    """Return the sibling that ``path`` is written to before it gets its name."""
    return path.with_name(f".{path.name}.tmp-{os.getpid()}")


@contextmanager
def explain_full_disk(path: Path) -> Iterator[None]:
    """Turn a write that found no space, by whatever library, into one sentence.

    Raises:
        DiskFullError: That.
    """
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise DiskFullError(
            f"There is no space left to write '{path}'. Free some, and run the command again. What "
            "was there before is unchanged."
        ) from error


@contextmanager
def atomic_file(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path; rename it to ``path`` on success, remove it on any failure.

    Args:
        path: The file.
        durable: Wait until it is on the disk, so that it survives a loss of power, too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        with explain_full_disk(path):
            yield temporary
            if durable:
                with temporary.open("rb+") as stream:
                    os.fsync(stream.fileno())
        share_file(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def share_file(path: Path) -> None:
    """Let others read a file that was written now, as far as the user's umask does.

    safetensors lets nobody else read what it writes, which a server of another user would have to.
    A link, or one of several names of a file, belongs to somebody else, and is left alone.
    """
    about = path.lstat()
    if stat.S_ISREG(about.st_mode) and about.st_nlink == 1:
        path.chmod(stat.S_IMODE(about.st_mode) | (0o444 & ~_get_umask()))


def _get_umask() -> int:
    mask = os.umask(0)  # there is no way to read it without setting it
    os.umask(mask)
    return mask


def save_json(path: Path, data: Any) -> None:
    """Write ``data`` as indented JSON, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(format_json(data), encoding="utf-8")


def compute_sha256(
    path: Path,
    *,
    patterns: tuple[str, ...] = ("*.safetensors", "*.json"),
    known: Mapping[str, str] | None = None,
) -> str:
    """Hash a file, or the files of a folder that match ``patterns`` (names and contents).

    Records of ours are left out: they hold hashes themselves.

    Args:
        path: File or folder.
        patterns: Which files of the folder count.
        known: Hashes of files in the folder that were computed already, by name.
    """
    if path.is_file():
        return _hash_file(path)
    known = known or {}
    total = hashlib.sha256()
    names = {file for pattern in patterns for file in path.glob(pattern)}
    for file in sorted(names):
        if file.name not in _RECORDS:
            digest = known.get(file.name) or _hash_file(file)
            total.update(f"{file.name} {digest}\n".encode())
    return total.hexdigest()


def _hash_file(path: Path) -> str:
    # Several records ask for the hash of one large file that was just written: it is read once.
    about = path.stat()
    # Any program can set the time of a change back, but not st_ctime.
    key = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)
    if key in _hashes:
        return _hashes[key]
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    if time.time_ns() - about.st_mtime_ns > _STEP_NS:
        _hashes[key] = digest.hexdigest()
    return digest.hexdigest()


def check_unchanged(path: Path, expected: str | None, *, fix: str) -> None:
    """Refuse an input whose hash is no longer the recorded one.

    Raises:
        ArtifactError: ``path`` has changed since ``expected`` was recorded.
    """
    if expected is not None and compute_sha256(path) != expected:
        raise ArtifactError(f"'{path}' has changed since it was written. {fix}")
