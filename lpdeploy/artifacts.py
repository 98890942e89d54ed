"""Files that stages hand over: written whole or not at all, hashed, and recorded.

Standard library only. Every writer makes a temporary sibling and renames it, so a run that is
killed leaves no half-written file under its final name. ``folders.py`` does the same for folders.
"""

import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lpdeploy.errors import ArtifactError, DiskFullError, is_disk_full
from lpdeploy.machine import list_versions, measure_peak_bytes, now
from lpdeploy.records import format_json, load_record

MANIFEST = "manifest.json"
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
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
    key = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)
    if key in _hashes:
        return _hashes[key]
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    if time.time_ns() - about.st_mtime_ns > _STEP_NS:
        _hashes[key] = digest.hexdigest()
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
    """Time a stage and, when it succeeds, write its record into ``folder/manifest.json``.

    Raises:
        ArtifactError: ``manifest.json`` is damaged; nothing has been done yet.
    """
    load_stages(folder)
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
    stages = load_stages(folder) | {name: record}
    save_json(
        folder / MANIFEST, {"stages": {key: stage.to_json() for key, stage in stages.items()}}
    )


def load_stages(folder: Path) -> dict[str, StageRecord]:
    """Read the records of all finished stages, in the order in which they first ran.

    Raises:
        ArtifactError: ``manifest.json`` is damaged.
    """
    path = folder / MANIFEST
    if not path.exists():
        return {}
    return load_record(_Manifest, path, fix="Delete it, and run the stages again.").stages


@dataclass(frozen=True)
class _Manifest:
    stages: dict[str, StageRecord]


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
