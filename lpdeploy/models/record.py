"""What ``compact`` says of the model that it wrote, in ``lpdeploy.json`` beside the weights."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpdeploy.artifacts import save_json
from lpdeploy.records import find_record

FILE = "lpdeploy.json"
SCHEMA_VERSION = 1
_FIX = "Run 'lpdeploy compact' again with `overwrite=True`."


@dataclass(frozen=True)
class ModelRecord:
    """Where a pruned model comes from, and its shape.

    Attributes:
        base_model: Folder or hub name of the unpruned model.
        base_sha256: Hash of that model's weights and config.
        plan_sha256: Hash of the plan file that the model was cut by.
        ratio: Share of groups that was asked to be removed.
        achieved: Share removed, of groups, heads, channels, layers and parameters.
        merged: Whether LoRA is in the weights; otherwise it lies in the folder ``adapter``.
        architecture: Class that loads the model.
        parameters: Number of parameters, ``before`` and ``after``, without an adapter.
        bytes: Size of the weights, ``before`` and ``after``.
        heads: Query heads of each layer.
        kv_heads: Key/value heads of each layer.
        channels: FFN channels of each layer.
        sha256: Hash of the model's weights and config.
        schema_version: Version of this file format.
    """

    base_model: str
    base_sha256: str
    plan_sha256: str
    ratio: float
    achieved: Mapping[str, float]
    merged: bool
    architecture: str
    parameters: Mapping[str, int]
    bytes: Mapping[str, int]
    heads: list[int]
    kv_heads: list[int]
    channels: list[int]
    sha256: str
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict; ``load_model_record`` reads it back."""
        return dataclasses.asdict(self)

    def save(self, folder: Path) -> None:
        """Write the record beside the model's weights."""
        save_json(folder / FILE, self.to_json())


def load_model_record(folder: Path) -> ModelRecord | None:
    """Read what ``compact`` recorded beside a model; None for a model that it did not write.

    Raises:
        ArtifactError: The record cannot be read.
    """
    return find_record(ModelRecord, folder / FILE, fix=_FIX, schema_version=SCHEMA_VERSION)
