"""What made a run: the command, the data, the seed, the versions and the hashes."""

import dataclasses
import shlex
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

from lpdeploy.config import PruneConfig
from lpdeploy.data.sources import is_data_file
from lpdeploy.manifest import StageRecord
from lpdeploy.report.facts import Facts


@dataclasses.dataclass(frozen=True)
class Origin:
    """How a run can be made again.

    Attributes:
        command: The command, with each path cut to its last part.
        facts: What it was made from -> name or number.
        hashes: What was read and written -> its SHA-256.
        versions: Library -> version.
        stages: The stages that have run.
    """

    command: str
    facts: Mapping[str, str]
    hashes: Mapping[str, str]
    versions: Mapping[str, str]
    stages: Mapping[str, StageRecord]


def trace_origin(facts: Facts) -> Origin:
    """Collect what made a run, from its manifest."""
    record = facts.stages.get("prune", StageRecord())
    options = record.options
    named = {
        "base model": name_source(facts.plan.base_model),
        "data": name_source(str(options.get("data") or "rows in memory")),
        **({"held-out text": name_source(str(options["valid"]))} if options.get("valid") else {}),
        "seed": str(options.get("seed", "not recorded")),
        "how": facts.method,
    }
    hashes = {f"{name} (read)": value for name, value in record.inputs.items()}
    for stage, made in facts.stages.items():
        hashes |= {f"{name} (written by {stage})": value for name, value in made.outputs.items()}
    command = _write_command(facts, options) if options else "not recorded"
    return Origin(command, named, hashes, record.versions, facts.stages)


def name_source(given: str) -> str:
    """Return the last part of a path, and a hub name as it is."""
    path = PurePath(given)
    is_path = given.startswith(("/", ".", "~")) or len(path.parts) > 2 or is_data_file(path)
    return path.name if is_path else given


def _write_command(facts: Facts, options: Mapping[str, Any]) -> str:
    words = [name_source(facts.plan.base_model), "--data", name_source(str(options.get("data")))]
    if options.get("valid"):
        words += ["--valid", name_source(str(options["valid"]))]
    words += ["--output", facts.name, *_list_words(options)]
    return shlex.join(["lpdeploy", "prune", *words])


def _list_words(options: Mapping[str, Any]) -> Iterator[str]:
    """Yield the options that are not what they are by default."""
    for field in dataclasses.fields(PruneConfig):
        value = options.get(field.name, field.default)
        if value == field.default or value is None:
            continue
        flag = field.name.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{flag}" if value else f"--no-{flag}"
        else:
            yield from (f"--{flag}", str(value))
