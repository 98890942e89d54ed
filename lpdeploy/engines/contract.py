"""The contract of an export: what it computes, its inputs and outputs, and what it was made from.

It is read and written in this module only. On disk it is ``io.json`` or, for TensorRT,
``engine.json``: one JSON object of schema version 1.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from lpdeploy.artifacts import save_json
from lpdeploy.engines.engine import Engine
from lpdeploy.errors import ArtifactError, LpdeployError
from lpdeploy.records import load_json, read_record

SCHEMA_VERSION = 1
CONCAT: Literal["concat"] = "concat"
IN_PLACE: Literal["in-place"] = "in-place"
_DTYPES = ("float32", "float16", "bfloat16", "int64", "int32")
DIMENSIONS = ("batch", "sequence", "past", "total")
"""Dimensions that a profile limits, as tensor shapes name them."""

Range = tuple[int, int, int]
"""Smallest, usual and largest size of a dimension."""
Profile = dict[str, Range]
"""Dimension -> the sizes that an engine admits."""

_Part = TypeVar("_Part")


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph.

    Attributes:
        name: Its name in the graph.
        dtype: Its type, as torch calls it.
        shape: Its sizes; a string names a dynamic dimension.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"{self.name} has dtype {self.dtype}, not {', '.join(_DTYPES)}")

    def resolve(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape with sizes in the place of dynamic dimensions' names."""
        return tuple(sizes[part] if isinstance(part, str) else part for part in self.shape)

    @property
    def is_past(self) -> bool:
        """Whether it is a part of the KV cache that goes in."""
        return self.name.startswith("past_key_values")


@dataclass(frozen=True)
class ModelRecord:
    """The model that was exported.

    Attributes:
        model_type: Its family, as in its config.
        num_hidden_layers: Number of decoder layers.
        num_attention_heads: Query heads of each layer.
        num_key_value_heads: KV heads of each layer.
        head_dim: Width of a head.
        vocab_size: Width of the logits.
        max_positions: Longest past + present that the model was made for, in tokens.
        bos_token_id: Token that starts a text, if it has one.
        eos_token_ids: Tokens that end a text.
    """

    model_type: str
    num_hidden_layers: int
    num_attention_heads: tuple[int, ...]
    num_key_value_heads: tuple[int, ...]
    head_dim: int
    vocab_size: int
    max_positions: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class SourceRecord:
    """The files that an export was made from.

    Attributes:
        model: Folder of the checkpoint.
        sha256: Hash of its weights and config.
        adapter: Folder of the adapter that stays unmerged, if there is one.
        adapter_sha256: Hash of the adapter.
    """

    model: str
    sha256: str
    adapter: str | None
    adapter_sha256: str | None


@dataclass(frozen=True)
class FileRecord:
    """Size and hash of a file that the engine loads."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class PackingRecord:
    """The part of a contract that only engine ort writes.

    Attributes:
        block_size: Weights that share a scale in int8 and int4; None in other precisions.
        genai: Whether ONNX Runtime GenAI opens the folder too.
    """

    block_size: int | None
    genai: bool


@dataclass(frozen=True)
class LibraryRecord:
    """The library that built an engine, ``tensorrt`` or ``tensorrt_rtx``, and its version."""

    name: str
    version: str


@dataclass(frozen=True)
class BuildRecord:
    """The part of a contract that only engine trt writes.

    Attributes:
        library: The library that built the engine, and the only one that can run it.
        compute_capability: Compute capability of the GPU that it runs on, or ``any``.
        cache: Whether each step concatenates the KV cache or writes it in place.
        profiles: Name -> dimension -> sizes that the engine admits.
        build_seconds: How long the build took.
    """

    library: LibraryRecord
    compute_capability: str
    cache: Literal["concat", "in-place"]
    profiles: dict[str, Profile]
    build_seconds: float

    def __post_init__(self) -> None:
        for name, profile in self.profiles.items():
            if profile.keys() != set(DIMENSIONS):
                raise ValueError(f"profiles.{name} does not limit {', '.join(DIMENSIONS)}")


@dataclass(frozen=True)
class Contract:
    """The description of an export.

    Attributes:
        engine: Name of the engine that runs it.
        precision: Precision of its weights.
        opset: Opset of its graph; None if it is no ONNX graph.
        merged: Whether LoRA is merged into the weights.
        inputs: Inputs of the graph, in their order.
        outputs: Outputs of the graph, in their order.
        model: The model.
        max_batch: Largest batch to serve.
        max_seq_len: Longest past + present to serve, in tokens.
        source: Checkpoint and adapter that it was made from.
        files: Files that the engine loads, by name.
        versions: Versions of Python and of the libraries that made it.
        packing: How ort packed the weights; None for other engines.
        build: How TensorRT built the engine; None for other engines.
    """

    engine: str
    precision: str
    opset: int | None
    merged: bool
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    model: ModelRecord
    max_batch: int
    max_seq_len: int
    source: SourceRecord
    files: dict[str, FileRecord]
    versions: dict[str, str]
    packing: PackingRecord | None = None
    build: BuildRecord | None = None

    @property
    def caches(self) -> tuple[TensorSpec, ...]:
        """Inputs that are the KV cache: key and value of each layer."""
        return tuple(spec for spec in self.inputs if spec.is_past)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict; ``from_json`` reads it back."""
        data = asdict(self)
        # In the file, the keys of these parts stand beside the others.
        parts = [data.pop(name) or {} for name in ("model", "packing", "build")]
        return {"schema_version": SCHEMA_VERSION, **data, **parts[0], **parts[1], **parts[2]}

    @classmethod
    def from_json(cls, data: Any) -> "Contract":
        """Read a contract back.

        Raises:
            ValueError: A key is missing or a value has the wrong type.
        """
        parts = {
            "model": read_record(ModelRecord, data),
            "packing": _read_part(PackingRecord, data),
            "build": _read_part(BuildRecord, data),
        }
        return read_record(cls, data, known=parts)

    def check_files(self, folder: Path, *, fix: str) -> None:
        """Check that the files of the export exist and have the recorded sizes.

        Raises:
            ArtifactError: One is missing or truncated.
        """
        for name, recorded in self.files.items():
            path = folder / name
            if not path.is_file():
                raise ArtifactError(f"No {name} in '{folder}'. {fix}")
            # The size tells a truncated copy at once; hashing gigabytes would double the loading.
            size = path.stat().st_size
            if size != recorded.bytes:
                raise ArtifactError(
                    f"'{path}' has {size} bytes, its export had {recorded.bytes}. "
                    f"Copy it again, or: {fix}"
                )


def _read_part(kind: type[_Part], data: Any) -> _Part | None:
    """Read the part that only some engines write; None if none of its keys is present."""
    present = any(field.name in data for field in fields(kind))  # type: ignore[arg-type]
    return read_record(kind, data) if present else None


def save_contract(contract: Contract, folder: Path, engine: Engine) -> None:
    """Write the contract of an export into its folder."""
    save_json(folder / engine.contract_file, contract.to_json())


def load_contract(folder: Path, engine: Engine) -> Contract:
    """Read the contract of an export, without opening the export.

    Args:
        folder: The export.
        engine: The engine that it must be for.

    Raises:
        ArtifactError: There is none, or it is damaged, of another engine or of another version.
    """
    path = folder / engine.contract_file
    data = load_json(path, fix=engine.fix)
    if not isinstance(data, dict) or data.get("engine") != engine.name:
        raise ArtifactError(f"'{path}' describes no export for {engine.name}. {engine.fix}")
    version = data.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ArtifactError(
            f"'{path}' has schema version {version!r}; this lpdeploy reads {SCHEMA_VERSION}. "
            f"{engine.fix}"
        )
    try:
        contract = Contract.from_json(data)
        engine.check_options({"precision": contract.precision})
    except (ValueError, LpdeployError) as error:
        reason = str(error).rstrip(".")
        raise ArtifactError(f"'{path}' is damaged: {reason}. {engine.fix}") from error
    return contract
