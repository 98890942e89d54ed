"""Folders that stages write: whole or not at all, and with a record of every file in them.

Standard library only. A folder is replaced only if all of it is in its record, and read only if its
files are still those that were written.
"""

import contextlib
import fcntl
import glob
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from lpdeploy.artifacts import (
    atomic_file,
    compute_sha256,
    explain_full_disk,
    share_file,
    temporary_path,
)
from lpdeploy.errors import ArtifactError
from lpdeploy.records import format_json, load_record, read_record

MANIFEST = "manifest.json"
FOLDER_RECORD = ".lpdeploy.json"
"""Lies in every folder that lpdeploy wrote. Only a folder that has it is ever replaced."""
# Files that appear beside what was written without anybody losing anything when they go.
_BY_THE_WAY = (MANIFEST, ".DS_Store")
_EDITED = ("README.md", "genai_config.json")  # which people edit
_STEP_NS = 1_000_000_000


@dataclass(frozen=True)
class FileStamp:
    """A file as it was written.

    Attributes:
        size: In bytes.
        mtime_ns: When it was last written, in nanoseconds.
        sha256: Of its contents.
    """

    size: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True)
class FolderRecord:
    """What a folder that lpdeploy wrote says of itself, in ``.lpdeploy.json``.

    Attributes:
        kind: ``adapter``, ``model``, ``export``, ``package`` or ``run``.
        files: Relative names of the files that were written, and what they were. In a run, which
            grows, those beside its folders, see ``recorded_files``. None for a file of which an
            earlier version kept the name only.
        written_ns: When the whole folder was written, in nanoseconds; 0 for a run.
    """

    kind: str
    files: Mapping[str, FileStamp | None] = field(default_factory=dict)
    written_ns: int = 0

    def save(self, folder: Path) -> None:
        """Write the record into its folder."""
        data = asdict(replace(self, files=dict(sorted(self.files.items()))))
        with atomic_file(folder / FOLDER_RECORD) as temporary:
            temporary.write_text(format_json(data), encoding="utf-8")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "FolderRecord":
        """Read a record back; an earlier version wrote a list of names as ``files``."""
        if isinstance(data.get("files"), list):
            data = {**data, "files": dict.fromkeys(map(str, data["files"]))}
        return read_record(cls, data)


def load_folder_record(folder: Path) -> FolderRecord | None:
    """Read the record of a folder; None if it has none, or none that can be read."""
    try:
        return load_record(FolderRecord, folder / FOLDER_RECORD, fix="")
    except ArtifactError:
        return None


@contextmanager
def recorded_files(folder: Path, *files: Path) -> Iterator[None]:
    """Let files of a folder be written or removed, and record what they are afterwards.

    Whoever dies in between leaves them without a record: not checked, but never taken for changed.

    Args:
        folder: One that lpdeploy wrote; the files of any other are not recorded.
        files: They lie in it.
    """
    names = [str(file.relative_to(folder)) for file in files]
    with lock_folder(folder, fcntl.LOCK_EX):
        for file in (*files, folder / FOLDER_RECORD):
            remove_leftovers(file)
        _amend_record(folder, names, {})
        yield
        stamps = {name: _stamp(folder / name) for name in names if (folder / name).is_file()}
        _amend_record(folder, names, stamps)


def _amend_record(folder: Path, names: Iterable[str], stamps: Mapping[str, FileStamp]) -> None:
    record = load_folder_record(folder)
    if record is None or not (stamps or record.files.keys() & set(names)):
        return
    kept = {name: stamp for name, stamp in record.files.items() if name not in names}
    replace(record, files={**kept, **stamps}).save(folder)


@contextmanager
def lock_folder(folder: Path, kind: int) -> Iterator[None]:
    """Wait until a folder can be locked, so that two processes do not write in it at once.

    Nor does one read a file between its writing and its record. Stages that only read a model may
    run at the same time, and each writes its result.

    Args:
        folder: Not locked if it does not exist, or where the file system locks no folders.
        kind: ``fcntl.LOCK_EX`` to write, ``fcntl.LOCK_SH`` to read.
    """
    handle = os.open(folder, os.O_RDONLY) if folder.is_dir() else None
    try:
        if handle is not None:
            with contextlib.suppress(OSError):  # not every file system locks folders
                fcntl.flock(handle, kind)
        yield
    finally:
        if handle is not None:
            os.close(handle)


def check_untouched(
    folder: Path, *, fix: str, only: Iterable[Path] | None = None, always_hash: bool = False
) -> int:
    """Refuse a folder of ours of which a file is not what was written.

    A file of the same size and time is taken for the same; otherwise its hash decides, so that a
    copied folder is good. What people edit, such as README.md, is left out.

    Args:
        folder: One without a record is not ours, and may hold anything.
        fix: Sentence that says how to get it back.
        only: Files in it to check; by default all that were written.
        always_hash: Hash every file.

    Returns:
        How many files were checked.

    Raises:
        ArtifactError: A file is missing or has changed, or the record cannot be read; names it.
    """
    with lock_folder(folder, fcntl.LOCK_SH):
        if (folder / FOLDER_RECORD).exists():
            record = load_record(FolderRecord, folder / FOLDER_RECORD, fix=fix)
            return _check_files(folder, record, fix=fix, only=only, always_hash=always_hash)
    return 0


def _check_files(
    folder: Path, record: FolderRecord, *, fix: str, only: Iterable[Path] | None, always_hash: bool
) -> int:
    asked, count = None if only is None else set(only), 0
    for name, stamp in record.files.items():
        path = folder / name
        if stamp is None or path.name in _EDITED or (asked is not None and path not in asked):
            continue
        count += 1
        if not path.is_file():
            raise ArtifactError(f"'{path}' is missing. {fix}")
        if not always_hash and _looks_untouched(path, stamp, record.written_ns):
            continue
        if compute_sha256(path) != stamp.sha256:
            raise ArtifactError(f"'{path}' has changed since it was written. {fix}")
    return count


def _looks_untouched(path: Path, stamp: FileStamp, written_ns: int) -> bool:
    about = path.stat()
    # File systems count time in steps: what was written just before the record may have been
    # written again just after it, in the same step.
    settled = stamp.mtime_ns < written_ns - _STEP_NS
    return settled and (about.st_size, about.st_mtime_ns) == (stamp.size, stamp.mtime_ns)


def find_recorded_folders(path: Path) -> list[Path]:
    """List the folders at and below a folder that have a record of their own."""
    return sorted(record.parent for record in path.rglob(FOLDER_RECORD))


def find_foreign_file(folder: Path) -> Path | None:
    """Find a file in a folder that lpdeploy did not write; None if all of it is ours.

    A folder below it that has a record of its own, such as an export in a model's folder, is
    searched by that record.
    """
    record = load_folder_record(folder)
    known = set(record.files) if record else set()
    # A killed process may have left these when it amended a finished folder.
    left = [p for name in (FOLDER_RECORD, MANIFEST) for p in _list_leftovers(folder / name, "tmp")]
    for path in sorted(set(folder.iterdir()).difference(left)):
        if path.is_dir() and not path.is_symlink():
            own = load_folder_record(path) is not None
            found = find_foreign_file(path) if own else _find_unknown(path, folder, known)
            if found is not None:
                return found
        elif path.name not in (*known, FOLDER_RECORD, *_BY_THE_WAY):
            return path
    return None


def _find_unknown(below: Path, folder: Path, known: set[str]) -> Path | None:
    if below.name == "__pycache__":
        return None
    files = sorted(path for path in below.rglob("*") if not path.is_dir())
    return next((path for path in files if str(path.relative_to(folder)) not in known), None)


@contextmanager
def atomic_folder(path: Path, *, kind: str, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder; rename it to ``path`` on success, remove it on any failure.

    Args:
        path: The folder.
        kind: What it is, for its record.
        overwrite: Replace a folder of the same kind, if lpdeploy wrote all that is in it.

    Raises:
        ArtifactError: ``path`` exists and may not be replaced.
    """
    _restore_set_aside(path)
    check_replaceable(path, kind=kind, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    temporary = temporary_path(path)
    try:
        with explain_full_disk(path):
            temporary.mkdir()
            yield temporary
            files = sorted(file for file in temporary.rglob("*") if not file.is_dir())
            # What was moved here from another folder may have brought that one's record.
            files = [file for file in files if file != temporary / FOLDER_RECORD]
            for file in files:
                share_file(file)
            stamps = {str(file.relative_to(temporary)): _stamp(file) for file in files}
            FolderRecord(kind, stamps, time.time_ns()).save(temporary)
        _replace_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _stamp(file: Path) -> FileStamp:
    about = file.stat()
    return FileStamp(about.st_size, about.st_mtime_ns, compute_sha256(file))


def check_replaceable(path: Path, *, kind: str, overwrite: bool) -> None:
    """Refuse to replace what is not to be replaced, or what lpdeploy did not write.

    Raises:
        ArtifactError: That; it names the file that would be lost.
    """
    if not path.exists():
        return
    if not overwrite:
        raise ArtifactError(
            f"'{path}' already exists. Use `overwrite=True` to replace it, or another `output`."
        )
    if not path.is_dir():
        raise ArtifactError(f"'{path}' is not a folder. Use another `output`.")
    if not any(path.iterdir()):
        return
    record, foreign = load_folder_record(path), find_foreign_file(path)
    if record is not None and record.kind != kind:
        raise ArtifactError(
            f"'{path}' holds another result of lpdeploy ({record.kind}), which is not replaced by "
            f"this one ({kind}). Use another `output`."
        )
    if foreign is not None:
        raise ArtifactError(
            f"'{path}' holds '{foreign.relative_to(path)}', which lpdeploy did not write. "
            "Nothing was replaced: move that file away, or use another `output`."
        )


def _replace_folder(temporary: Path, path: Path) -> None:
    # A folder cannot be renamed over a full one: the old one steps aside first, and is still
    # whole under its other name if the process dies between the two renames.
    aside = path.with_name(f".{path.name}.old-{os.getpid()}")
    if path.exists():
        path.rename(aside)
    temporary.rename(path)
    shutil.rmtree(aside, ignore_errors=True)


def _restore_set_aside(path: Path) -> None:
    """Put the old folder back if a process died between the two renames: it is the only one."""
    if not path.exists():
        found = _list_leftovers(path, "old")
        aside = [leftover for leftover in found if (leftover / FOLDER_RECORD).is_file()]
        if aside:
            max(aside, key=lambda leftover: leftover.stat().st_mtime_ns).rename(path)


def remove_leftovers(path: Path) -> None:
    """Delete temporary siblings of ``path`` that killed processes left behind.

    One that cannot be deleted stays: it is in nobody's way.
    """
    for leftover in _list_leftovers(path, "tmp|old"):
        with contextlib.suppress(OSError):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()


def _list_leftovers(path: Path, kinds: str) -> list[Path]:
    name = re.compile(rf"\.{re.escape(path.name)}\.({kinds})-([1-9][0-9]{{0,8}})")
    found = path.parent.glob(f".{glob.escape(path.name)}.*-*") if path.parent.is_dir() else ()
    matches = ((leftover, name.fullmatch(leftover.name)) for leftover in found)
    return [leftover for leftover, match in matches if match and not _is_alive(int(match[2]))]


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def make_folders(path: Path) -> list[Path]:
    """Make a folder and those above it; return those that were made, the innermost first."""
    made = []
    for folder in (path, *path.parents):
        if folder.exists():
            break
        made.append(folder)
    path.mkdir(parents=True, exist_ok=True)
    return made


def remove_empty_folders(folders: Iterable[Path]) -> None:
    """Remove folders, the innermost first; one that something lies in stays."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def open_lock(path: Path, *, shared: bool) -> AbstractContextManager[IO[str] | None]:
    """Open the file that a lock is put on; nothing to lock where it cannot be written anyway."""
    try:
        return path.open("a+")
    except OSError:
        if not shared:
            raise
        return nullcontext()  # a folder that cannot be written is not written by others either
