"""Tensors of a checkpoint as constants of a graph, each read when the graph is written."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype
from torch import Tensor

from lpdeploy.engines.ort_session import quantize_blocks
from lpdeploy.errors import ArtifactError, LpdeployError
from lpdeploy.models.adapters import load_adapter
from lpdeploy.models.finite import round_weight
from lpdeploy.models.loading import load_config
from lpdeploy.models.weight_files import index_weights

_OVERFLOW_SCALES = "Use `activations='bf16'` or `activations='fp32'`."
_OVERFLOW = "Use `precision='bf16'` or `precision='fp32'`."


@dataclass(frozen=True)
class BlockFormat:
    """Weight-only quantization: a scale for each block of a row, symmetric.

    Attributes:
        bits: 4 or 8.
        block_size: Consecutive inputs of one output that share a scale; a power of two from 16.
    """

    bits: int
    block_size: int

    def check(self, name: str, width: int) -> None:
        """Refuse a weight whose rows are no whole number of blocks.

        Raises:
            LpdeployError: ``block_size`` does not divide ``width``.
        """
        if width % self.block_size:
            fits = [size for size in (256, 128, 64, 32, 16) if width % size == 0]
            hint = f"Use `block_size={fits[0]}`" if fits else "Prune with `round_to=32`"
            raise LpdeployError(
                f"`block_size` {self.block_size} does not divide the {width} inputs of {name}. "
                f"{hint}, or another `precision`."
            )


class Weights:
    """What ``build_decoder`` takes its constants from.

    Nothing is read before the graph is saved, and then one tensor at a time, so that a model
    larger than memory can be exported.
    """

    def __init__(self, folder: Path, *, dtype: torch.dtype, adapter: Path | None = None) -> None:
        self._stored = index_weights(folder, load_config(folder))
        self._dtype = dtype
        self._lora = load_adapter(adapter) if adapter else {}
        # The packed weight and its scales come of one computation and are written one after the
        # other.
        self._quantize = functools.lru_cache(maxsize=1)(self._quantize_once)

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def has_lora(self, module: str) -> bool:
        """Tell whether a projection has LoRA beside it."""
        return module in self._lora

    def get_shape(self, *names: str) -> tuple[int, ...]:
        """Return the shape of a tensor of the checkpoint, (out, in) for a projection.

        Args:
            names: Of the tensor, or of several whose rows are put one after the other.

        Raises:
            ArtifactError: The checkpoint has no such tensor.
        """
        for name in names:
            if name not in self._stored:
                raise ArtifactError(f"The checkpoint has no {name}. Give a complete checkpoint.")
        shapes = [self._stored[name].info.shape for name in names]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def build_constant(self, *names: str, transpose: bool = False) -> ir.LazyTensor:
        """Return tensors of the checkpoint, as one, in the precision of the graph."""
        shape = self.get_shape(*names)
        return self._build(
            "+".join(names),
            shape[::-1] if transpose else shape,
            self._dtype,
            lambda: self._load(names).T if transpose else self._load(names),
        )

    def build_quantized(
        self, *names: str, form: BlockFormat
    ) -> tuple[ir.LazyTensor, ir.LazyTensor]:
        """Return a projection, or several as one, packed in blocks, and its scales.

        Returns:
            Packed, shape (out, in / block, block * bits / 8), uint8; and scales, shape
            (out, in / block), in the precision of the graph.
        """
        rows, columns = self.get_shape(*names)
        name = "+".join(names)
        form.check(names[0], columns)
        blocks, blob = columns // form.block_size, form.block_size * form.bits // 8
        packed = self._build(
            f"{name}.q{form.bits}",
            (rows, blocks, blob),
            torch.uint8,
            lambda: self._quantize(names, form)[0],
        )
        scales = self._build(
            f"{name}.scales",
            (rows, blocks),
            self._dtype,
            lambda: round_weight(
                self._quantize(names, form)[1], self._dtype, name=name, fix=_OVERFLOW_SCALES
            ),
        )
        return packed, scales

    def build_lora(self, module: str) -> tuple[ir.Tensor, ir.Tensor] | None:
        """Return A^T, shape (in, rank), and scaling B^T, shape (rank, out), of a projection."""
        if module not in self._lora:
            return None
        lora = self._lora[module]
        down = lora.lora_a.T.to(self._dtype).contiguous()
        up = (lora.scaling * lora.lora_b.float()).T.to(self._dtype).contiguous()
        return (
            TorchTensor(down, name=f"{module}.lora_a"),
            TorchTensor(up, name=f"{module}.lora_b"),
        )

    def _build(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, load: Callable[[], Tensor]
    ) -> ir.LazyTensor:
        return ir.LazyTensor(
            lambda: TorchTensor(load().contiguous(), name=name),
            dtype=from_torch_dtype(dtype),
            shape=ir.Shape(shape),
            name=name,
        )

    def _load(self, names: tuple[str, ...], dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self._dtype
        parts = [
            round_weight(self._stored[name].load(), dtype, name=name, fix=_OVERFLOW)
            for name in names
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _quantize_once(self, names: tuple[str, ...], form: BlockFormat) -> tuple[Tensor, Tensor]:
        weight = self._load(names, torch.float32)  # from what is stored, rounded once only
        return quantize_blocks(weight, bits=form.bits, block_size=form.block_size)
