"""What every stage records of itself in ``manifest.json``: options, hashes, versions, time, memory.

Standard library only.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lpdeploy.artifacts import save_json
from lpdeploy.folders import MANIFEST, recorded_files
from lpdeploy.machine import list_versions, measure_peak_bytes, now
from lpdeploy.records import load_record


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
    data = {"stages": {key: stage.to_json() for key, stage in stages.items()}}
    with recorded_files(folder, folder / MANIFEST):
        save_json(folder / MANIFEST, data)


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
