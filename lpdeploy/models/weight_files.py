"""Which file of a checkpoint holds which weight, and which weights are one and the same."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig

from lpdeploy.errors import ArtifactError
from lpdeploy.models.find import list_weight_files
from lpdeploy.models.tensor_files import TensorInfo, load_layout

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
"""A tied checkpoint may store either of them, or both."""
_COMPARED_ROWS = 4096


@dataclass(frozen=True)
class StoredWeight:
    """A weight in a file.

    Attributes:
        file: The file.
        name: What the file calls it.
        info: Its type and shape.
    """

    file: Path
    name: str
    info: TensorInfo

    def load(self) -> Tensor:
        """Read it as it is stored."""
        with safe_open(self.file, framework="pt") as tensors:
            return tensors.get_tensor(self.name)


def index_weights(folder: Path, config: PretrainedConfig) -> dict[str, StoredWeight]:
    """Map the name of each weight of a checkpoint to where it is stored.

    Of tied embeddings, both names lead to the weight that is stored.

    Raises:
        ArtifactError: A file is missing or damaged, or two files hold the same weight.
    """
    stored: dict[str, StoredWeight] = {}
    for file in list_weight_files(folder):
        for name, info in load_layout(file).items():
            if name in stored:
                raise ArtifactError(
                    f"'{folder}' holds {name} twice, in {stored[name].file.name} and {file.name}, "
                    "and which of them counts is not known. Save the model again with "
                    "save_pretrained."
                )
            stored[name] = StoredWeight(file, name, info)
    if config.tie_word_embeddings:
        for name, other in ((EMBEDDING, HEAD), (HEAD, EMBEDDING)):
            if name not in stored and other in stored:
                stored[name] = stored[other]
    return stored


def is_tied(folder: Path) -> bool:
    """Tell whether the embedding and the head of a checkpoint can be one weight.

    transformers leaves them apart where both are stored and differ, whatever the config says.

    Raises:
        ArtifactError: A file is missing or damaged.
    """
    found: dict[str, Path] = {}
    for file in list_weight_files(folder):
        found |= {name: file for name in (EMBEDDING, HEAD) if name in load_layout(file)}
    return len(found) < 2 or _are_equal(found)


def _are_equal(found: Mapping[str, Path]) -> bool:
    with (
        safe_open(found[EMBEDDING], framework="pt") as one,
        safe_open(found[HEAD], framework="pt") as other,
    ):
        left, right = one.get_slice(EMBEDDING), other.get_slice(HEAD)
        if left.get_shape() != right.get_shape():
            return False
        starts = range(0, left.get_shape()[0], _COMPARED_ROWS)
        return all(
            torch.equal(left[start : start + _COMPARED_ROWS], right[start : start + _COMPARED_ROWS])
            for start in starts
        )
