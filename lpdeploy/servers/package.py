"""The package stage: check that the server loads the shape, write the folder, record it."""

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from lpdeploy.artifacts import compute_sha256, save_json
from lpdeploy.errors import ArtifactError, OptionError
from lpdeploy.folders import atomic_folder
from lpdeploy.machine import list_versions
from lpdeploy.manifest import record_stage
from lpdeploy.models.loading import compute_model_sha256, load_config
from lpdeploy.models.place import locate_model
from lpdeploy.models.shapes import list_widths
from lpdeploy.run_folder import PACKAGE, check_output
from lpdeploy.servers.verdicts import Packager, Packed, Server, get_server, judge

_SCHEMA_VERSION = 1
PACKAGE_FILE = "lpdeploy-package.json"


@dataclass(frozen=True, kw_only=True)
class PackageResult(Packed):
    """A package that was written.

    Attributes:
        target: The server it is for: triton, genai, vllm or llamacpp.
        output: The folder.
        files: Names of the files in it, relative to it.
        bytes: Their size.
        seconds: How long it took.
    """

    target: str
    output: str
    files: Sequence[str]
    bytes: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict, in which the details stand beside the rest."""
        data = asdict(self)
        return {**data.pop("details"), **data}


def package(
    model: str | os.PathLike[str],
    *,
    kind: str,
    output: Path,
    overwrite: bool = False,
    **options: Any,
) -> PackageResult:
    """Write a ready-to-serve folder, with the command that starts the server in its README.md.

    Args:
        model: Run, model folder or hub name.
        kind: Target of a server in ``SERVERS``: triton, genai, vllm or llamacpp.
        output: The folder.
        overwrite: Replace what is there.
        options: Of the packager; None is as if not given.

    Raises:
        ArtifactError: The run has no model yet, the server does not take its shape, or ``output``
            exists, holds what it is made from, or lies inside the model.
        OptionError: There is no such target, or its packager does not know an option.
    """
    options = {name: value for name, value in options.items() if value is not None}
    server = get_server(kind)
    packager = server.load_packager()
    _check_options(kind, packager, options)
    place = locate_model(model)
    check_output(output, inputs=place.inputs)
    condition = _check_shape(place.folder, server, ranks=options.get("tensor_parallel", 1))
    record = {"model": str(model), "kind": kind, **options}
    # A model that is no run of ours is left as it is: the record lies in the package then.
    records = output if place.run is None else place.records
    with place.hold(), record_stage(records, f"package {kind}", record) as stage:
        with atomic_folder(output, kind=PACKAGE, overwrite=overwrite) as folder:
            packed = packager(place, folder, output=output, **options)
            source = {"model": str(place.folder), "sha256": compute_model_sha256(place.folder)}
            _save_mark(folder, packed, kind=kind, source=source, options=options)
        stage.inputs = {place.folder.name: source["sha256"]}
        stage.outputs = {output.name: compute_sha256(output / PACKAGE_FILE)}
    files = sorted(path for path in output.rglob("*") if path.is_file())
    return PackageResult(
        command=packed.command,
        notes=[*([condition] if condition else []), *packed.notes],
        details=packed.details,
        target=kind,
        output=str(output),
        files=[str(path.relative_to(output)) for path in files],
        bytes=sum(path.stat().st_size for path in files),
        seconds=stage.seconds,
    )


def _check_options(kind: str, packager: Packager, options: Mapping[str, object]) -> None:
    unknown = options.keys() - inspect.signature(packager).parameters
    if unknown:
        raise OptionError(f"`{min(unknown)}` is not an option of `target={kind}`. Leave it out.")


def _check_shape(model: Path, server: Server, *, ranks: int) -> str | None:
    """Refuse a shape that the server does not take.

    Returns:
        The condition on which it does, or None.
    """
    config = load_config(model)
    verdict = judge(server, config, ranks)
    if verdict.loads == "no":
        nearest = describe_nearest(config)
        raise ArtifactError(f"{verdict.name} does not load '{model}'. {verdict.why}{nearest}")
    return verdict.why if verdict.loads == "condition" else None


def describe_nearest(config: PretrainedConfig) -> str:
    """Say which uniform shape is nearest to one whose layers differ; empty for one that is uniform.

    The mean of heads and channels keeps the size; channels go to the multiple of 32 that ``prune``
    rounds to.
    """
    widths = list_widths(config)
    if len(set(widths)) == 1:
        return ""  # what stands against it names what would not
    kv_heads = max(1, round(sum(width.kv_heads for width in widths) / len(widths)))
    heads = kv_heads * widths[0].heads // widths[0].kv_heads
    mean = sum(width.channels for width in widths) / len(widths)
    channels = max(32, round(mean / 32) * 32)
    return (
        f" The nearest shape that it takes has {heads} heads ({kv_heads} KV) and {channels} "
        "channels in every layer."
    )


def _save_mark(
    folder: Path,
    packed: Packed,
    *,
    kind: str,
    source: Mapping[str, str],
    options: Mapping[str, Any],
) -> None:
    """Save what the folder is, which also tells --overwrite that lpdeploy wrote it."""
    mark = {
        "schema_version": _SCHEMA_VERSION,
        "target": kind,
        "source": source,
        "options": dict(options),
        "command": packed.command,
        "versions": list_versions(),
    }
    save_json(folder / PACKAGE_FILE, mark)
