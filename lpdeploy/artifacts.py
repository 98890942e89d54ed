"""Files and folders that stages hand over: written whole or not at all, hashed, and recorded.

Standard library only. Every writer here makes a temporary sibling and renames it, so a run
that is killed leaves no half-written artifact under its final name.
"""

import glob
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lpdeploy.errors import ArtifactError
from lpdeploy.machine import list_versions, measure_peak_bytes, now
from lpdeploy.records import read_record

MANIFEST = "manifest.json"
FOLDER_RECORD = ".lpdeploy.json"
"""Lies in every folder that lpdeploy wrote. Only a folder that has it is ever replaced."""
# Files that appear beside what was written without anybody losing anything when they go.
_BY_THE_WAY = (MANIFEST, ".DS_Store")
_BLOCK_BYTES = 1 << 22
_Record = TypeVar("_Record")


def temporary_path(path: Path) -> Path:
    """Return the sibling that ``path`` is written to before it gets its name."""
    return path.with_name(f".{path.name}.tmp-{os.getpid()}")


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
        yield temporary
        if durable:
            with temporary.open("rb+") as stream:
                os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class FolderRecord:
    """What a folder that lpdeploy wrote says of itself, in ``.lpdeploy.json``.

    Attributes:
        kind: ``adapter``, ``model``, ``export``, ``package`` or ``run``.
        files: Relative names of the files that were written; empty for a run, which grows.
    """

    kind: str
    files: tuple[str, ...] = ()

    def save(self, folder: Path) -> None:
        """Write the record into its folder."""
        data = {"kind": self.kind, "files": list(self.files)}
        (folder / FOLDER_RECORD).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def load_folder_record(folder: Path) -> FolderRecord | None:
    """Read the record of a folder; None if it has none, or none that can be read."""
    try:
        data = json.loads((folder / FOLDER_RECORD).read_text(encoding="utf-8"))
        return FolderRecord(str(data["kind"]), tuple(map(str, data["files"])))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def find_foreign_file(folder: Path) -> Path | None:
    """Find a file in a folder that lpdeploy did not write; None if all of it is ours.

    A folder below it that has a record of its own, such as an export in a model's folder, is
    searched by that record.
    """
    record = load_folder_record(folder)
    known = set(record.files) if record else set()
    for path in sorted(folder.iterdir()):
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
    check_replaceable(path, kind=kind, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    temporary = temporary_path(path)
    try:
        temporary.mkdir()
        yield temporary
        files = sorted(file for file in temporary.rglob("*") if not file.is_dir())
        names = tuple(str(file.relative_to(temporary)) for file in files)
        FolderRecord(kind, names).save(temporary)
        _replace_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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


def remove_leftovers(path: Path) -> None:
    """Delete temporary siblings of ``path`` that killed processes left behind."""
    name = re.compile(rf"\.{re.escape(path.name)}\.(tmp|old)-(\d+)")
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*-*"):
        found = name.fullmatch(leftover.name)
        if found and not _is_alive(int(found[2])):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def save_json(path: Path, data: Any) -> None:
    """Write ``data`` as indented JSON, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(format_json(data), encoding="utf-8")


def format_json(data: Any) -> str:
    """Write ``data`` as the text of a JSON file."""
    return json.dumps(data, indent=2) + "\n"


def load_json(path: Path, *, fix: str) -> Any:
    """Read JSON.

    Args:
        path: The file.
        fix: Sentence that tells the user what to do where the file is missing or broken.

    Raises:
        ArtifactError: It is missing or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"No {path.name} in '{path.parent}'. {fix}") from None
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or nested without end
        raise ArtifactError(f"'{path}' is not valid JSON ({error}). {fix}") from error


def load_record(kind: type[_Record], path: Path, *, fix: str) -> _Record:
    """Read a JSON file into a dataclass; see ``read_record``.

    Raises:
        ArtifactError: The file is missing, no JSON, or holds something else.
    """
    data = load_json(path, fix=fix)
    try:
        return read_record(kind, data)
    except ValueError as error:
        raise ArtifactError(f"'{path}' cannot be used: {error}. {fix}") from error


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
        if file.name not in ("lpdeploy.json", FOLDER_RECORD):
            digest = known.get(file.name) or _hash_file(file)
            total.update(f"{file.name} {digest}\n".encode())
    return total.hexdigest()


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


@dataclass
class Stage:
    """What a running stage says of itself, for its record.

    Attributes:
        inputs: Hash of each file or folder that it read, by name.
        outputs: Hash of each file or folder that it wrote, by name.
        planned: Planned memory in bytes, by purpose; empty without a plan.
        seconds: How long it took; known once it has finished.
        peak_bytes: Its peak memory, likewise.
    """

    inputs: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    planned: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    peak_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """A finished stage, as ``manifest.json`` keeps it.

    Attributes:
        options: The options of the stage.
        inputs: Hash of each file or folder that it read, by name.
        outputs: Hash of each file or folder that it wrote, by name.
        seconds: How long it took.
        peak_bytes: Peak memory, see ``measure_peak_bytes``.
        planned_bytes: Planned memory by purpose; not written where there was no plan.
        versions: Of Python and the libraries, see ``list_versions``.
        finished: When it finished, in UTC (ISO 8601).
    """

    options: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    peak_bytes: int = 0
    planned_bytes: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    finished: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return what ``manifest.json`` holds of the stage."""
        data = asdict(self)
        if not self.planned_bytes:
            del data["planned_bytes"]
        return data


@contextmanager
def record_stage(folder: Path, name: str, options: Mapping[str, Any]) -> Iterator[Stage]:
    """Time a stage and, when it succeeds, write its record into ``folder/manifest.json``."""
    stage = Stage()
    start = time.perf_counter()
    yield stage
    stage.seconds = round(time.perf_counter() - start, 3)
    stage.peak_bytes = measure_peak_bytes()
    record = StageRecord(
        options=dict(options),
        inputs=stage.inputs,
        outputs=stage.outputs,
        seconds=stage.seconds,
        peak_bytes=stage.peak_bytes,
        planned_bytes=stage.planned,
        versions=list_versions(),
        finished=now(),
    )
    path = folder / MANIFEST
    stages = load_json(path, fix="Delete it.")["stages"] if path.is_file() else {}
    save_json(path, {"stages": stages | {name: record.to_json()}})


def load_stages(folder: Path) -> dict[str, StageRecord]:
    """Read the records of all finished stages, in the order in which they first ran.

    Raises:
        ArtifactError: ``manifest.json`` is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    return load_record(_Manifest, path, fix="Run the stage again.").stages


@dataclass(frozen=True)
class _Manifest:
    stages: dict[str, StageRecord] = field(default_factory=dict)


def load_stage(folder: Path, name: str) -> StageRecord | None:
    """Read the record of a finished stage; None where there is none."""
    return load_stages(folder).get(name)


def load_output_hash(folder: Path, stage: str, name: str) -> str | None:
    """Read the hash that a stage recorded of an output; None where it recorded none."""
    record = load_stage(folder, stage)
    return record.outputs.get(name) if record else None


def check_unchanged(path: Path, expected: str | None, *, fix: str) -> None:
    """Refuse an input whose hash is no longer the recorded one.

    Raises:
        ArtifactError: ``path`` has changed since ``expected`` was recorded.
    """
    if expected is not None and compute_sha256(path) != expected:
        raise ArtifactError(f"'{path}' has changed since it was recorded. {fix}")
