"""Whether a result of a stage holds the weights that it should, one weight at a time.

A weight in the wrong place changes logits by little: in half precision, one FFN channel of a
thousand hides in what rounding does to all of them. The weights themselves hide nothing. Each must
be the expected one, rounded once to the precision of the result.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, nn

from lpdeploy.models.adapters import load_adapter
from lpdeploy.models.loading import load_config
from lpdeploy.models.weight_files import EMBEDDING, HEAD, index_weights

_SLACK = 1e-6
"""Two float32 sums of the same numbers differ by so much of the largest weight at most."""


@dataclass(frozen=True)
class WeightsCheck:
    """The weights of a result compared with those that it was made from.

    Attributes:
        a: The stage that has the expected weights.
        b: The result.
        num_weights: How many were compared.
        wrong: Names of those that are not the expected ones, rounded.
    """

    a: str
    b: str
    num_weights: int
    wrong: tuple[str, ...]

    @classmethod
    def summarize(cls, a: str, b: str, wrong: Mapping[str, bool]) -> "WeightsCheck":
        """Count the weights, each with whether it is wrong."""
        return cls(a, b, len(wrong), tuple(name for name, is_wrong in wrong.items() if is_wrong))

    @property
    def ok(self) -> bool:
        """Whether every weight is right, and there were some."""
        return not self.wrong and self.num_weights > 0


def check_checkpoint(model: nn.Module, folder: Path, *, a: str, b: str) -> WeightsCheck:
    """Compare a checkpoint with the model in memory that it was saved from.

    Args:
        model: In float32, before the weights were rounded.
        folder: The checkpoint.
        a: Name of the stage of ``model``.
        b: Name of the stage of ``folder``.
    """
    stored = index_weights(folder, load_config(folder))
    expected = {name: weight.detach() for name, weight in model.named_parameters()}
    wrong = {
        name: name not in stored or not is_rounded(stored[name].load(), weight)
        for name, weight in expected.items()
    }
    more = stored.keys() - expected.keys() - {EMBEDDING, HEAD}  # a tied one goes by two names
    return WeightsCheck.summarize(a, b, wrong | dict.fromkeys(sorted(more), True))


def is_rounded(found: Tensor, expected: Tensor) -> bool:
    """Tell whether a tensor is another one, rounded once to its own precision."""
    if found.shape != expected.shape:
        return False
    rounded = expected.to(found.dtype).float()
    # Where the exact value is half way between two numbers, either is right.
    slack = _SLACK * expected.abs().max()
    return bool(((found.float() - expected).abs() <= (rounded - expected).abs() + slack).all())


def list_expected(
    model_folder: Path, adapter: Path | None, *, scaled: bool
) -> dict[str, Callable[[], Tensor]]:
    """Return how to read each weight that an export must hold, those of an adapter included.

    Args:
        model_folder: The checkpoint; tied embeddings have two names.
        adapter: An adapter beside it.
        scaled: Whether the export holds ``scaling * lora_b`` in the place of ``lora_b``.
    """
    stored = index_weights(model_folder, load_config(model_folder))
    expected = {name: weight.load for name, weight in stored.items()}
    for module, lora in (load_adapter(adapter) if adapter else {}).items():
        expected[f"{module}.lora_a"] = partial(_pass, lora.lora_a)
        up = lora.scaling * lora.lora_b.float() if scaled else lora.lora_b
        expected[f"{module}.lora_b"] = partial(_pass, up)
    return expected


def _pass(tensor: Tensor) -> Tensor:
    return tensor


def list_initializers(graph: Path) -> Mapping[str, ir.TensorProtocol]:
    """Map the names of a graph's constants to them; large ones are read when they are used."""
    model = ir.load(graph)
    return {
        name: value.const_value
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }


def find_missing(
    expected: Mapping[str, Callable[[], Tensor]], constants: Iterable[bytes], dtype: torch.dtype
) -> dict[str, bool]:
    """Say of each weight whether it is in no constant of a graph, bit for bit.

    Exporters rename and transpose weights, and keep some in float32. So each is looked for by what
    it holds, as it is or transposed.

    Args:
        expected: Name -> how to read the weight.
        constants: The bytes of each constant.
        dtype: What the exporter rounded weights to.

    Returns:
        Name -> whether it is missing.
    """
    hashes = {hashlib.sha256(data).digest() for data in constants}
    return {name: hashes.isdisjoint(_hash_forms(load(), dtype)) for name, load in expected.items()}


def _hash_forms(weight: Tensor, dtype: torch.dtype) -> Iterator[bytes]:
    rounded = weight.to(dtype)
    for kept in (rounded, rounded.float()):
        for form in (kept, kept.T) if kept.ndim == 2 else (kept,):
            data = form.contiguous().view(torch.uint8).numpy()
            yield hashlib.sha256(data.data).digest()
