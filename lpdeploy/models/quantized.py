"""A base quantized by bitsandbytes while it is pruned: loading it, reading it, cutting it."""

import copy
import logging
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lpdeploy.errors import LpdeployError, MissingDependencyError

LOAD_IN = ("8bit", "4bit")
"""What ``load_in`` may be: LLM.int8() (int8 rows, one scale a row), or nf4 (blocks of 64)."""

# Activations from this magnitude on are multiplied in floating point by the CUDA kernel, the value
# of LLM.int8() (arXiv:2208.07339); without it models from about 7B on lose their outlier features.
# It looks at the input only, column by column, and a group that was cut has none, so cutting stays
# as exact as without it. Training on a CPU multiplies in floating point and never looks at it.
_OUTLIER_THRESHOLD = 6.0
_NF4_BLOCK = 64  # weights that share a scale; a block may span two rows


def import_bitsandbytes() -> Any:
    """Import bitsandbytes.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        import bitsandbytes
    except ImportError:
        raise MissingDependencyError(
            "bitsandbytes is not installed; `load_in` needs it. "
            "Install with: pip install 'lpdeploy[quant]'."
        ) from None
    return bitsandbytes


def check_load_in(load_in: str | None) -> None:
    """Check that a base model can be loaded in ``load_in``; None is full precision.

    Raises:
        MissingDependencyError: bitsandbytes is not installed.
        ValueError: ``load_in`` is neither None nor one of ``LOAD_IN``.
    """
    if load_in is not None:
        _check_kind(load_in)
        import_bitsandbytes()


def _check_kind(load_in: str) -> None:
    if load_in not in LOAD_IN:
        raise ValueError(f"load_in is {load_in!r}; it must be {' or '.join(LOAD_IN)}")


def check_4bit_widths(model: nn.Module) -> None:
    """Check that a CPU computes the 4-bit weights of a model right: rows divide into blocks.

    On CPUs with AVX-512, the kernel of bitsandbytes 0.50.2 takes the blocks to begin anew in each
    row. Where a block spans two rows, it multiplies by the wrong scales, without an error.

    Raises:
        LpdeployError: A 4-bit weight has rows whose length is no multiple of 64.
    """
    for name, module in model.named_modules():
        if get_quantization(module) != "4bit":
            continue
        columns = get_weight_shape(module)[1]
        if columns % _NF4_BLOCK:
            raise LpdeployError(
                f"{name} has {columns} inputs, which is no multiple of {_NF4_BLOCK}: in 4 bits, "
                "bitsandbytes computes it wrong on a CPU. Use `load_in='8bit'` or a GPU."
            )


def build_quantization(
    load_in: str, *, dtype: torch.dtype, unquantized: Collection[str] = ()
) -> Any:
    """Build what transformers quantizes the Linears by while it loads them, one at a time.

    Only the projections of the layers are quantized; embeddings and ``lm_head`` stay as they are.

    Args:
        load_in: ``8bit`` or ``4bit`` (nf4, with its scales quantized too).
        dtype: What 4-bit weights are turned into to compute with.
        unquantized: Projections that stay as they are, such as ``o_proj``.

    Returns:
        A ``BitsAndBytesConfig``.

    Raises:
        MissingDependencyError: bitsandbytes is not installed.
        ValueError: ``load_in`` is neither.
    """
    _check_kind(load_in)
    import_bitsandbytes()
    from transformers import BitsAndBytesConfig

    skipped = ["lm_head", *unquantized]
    if load_in == "8bit":
        return BitsAndBytesConfig(
            load_in_8bit=True,
            llm_int8_threshold=_OUTLIER_THRESHOLD,
            llm_int8_skip_modules=skipped,
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skipped,  # the name is old; it counts for 4-bit too
    )


def apply_training_layout(model: nn.Module) -> None:
    """Keep the weights of a quantized model as they are read, trained over and cut here."""
    # On CPUs with AVX512-BF16, 4-bit layers repack their weights at the first forward in eval mode
    # into a form whose scales are rounded, that has no gradient and that rows cannot be read from.
    module: Any
    for module in model.modules():
        if get_quantization(module) == "4bit":
            module.support_avx512bf16_for_cpu = False
    # At each call it says that inputs are cast to fp16 before they become int8.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def build_random_8bit(linear: Any, *, device: str) -> Any:
    """Build an 8-bit Linear of the shape of another with random codes; they cost what real ones do.

    Args:
        linear: Of which the shape is taken; it may be on the meta device. A bias is left there.
        device: Where to make it.

    Raises:
        MissingDependencyError: bitsandbytes is not installed.
    """
    bnb = import_bitsandbytes()
    out, columns = linear.weight.shape
    with torch.device("meta"):
        made = bnb.nn.Linear8bitLt(
            columns, out, linear.bias is not None, has_fp16_weights=False,
            threshold=_OUTLIER_THRESHOLD,
        )  # fmt: skip
    codes = torch.randint(-127, 128, (out, columns), dtype=torch.int8, device=device)
    scales = torch.full((out,), 0.035, device=device)  # weights of about 0.02
    made.weight = bnb.nn.Int8Params(
        codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales
    )
    return made


def list_misshapen(model: nn.Module) -> list[str]:
    """List the quantized weights of another shape than their Linear's.

    transformers compares the shapes of a checkpoint with the model's, but not of those it
    quantizes.
    """
    linears = [(n, m) for n, m in model.named_modules() if get_quantization(m)]
    return [
        f"{name}.weight"
        for name, linear in linears
        if get_weight_shape(linear) != (linear.out_features, linear.in_features)
    ]


def list_scales(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """List the scales of the quantized weights: where one is no number, neither is its weight."""
    module: Any
    for name, module in model.named_modules():
        match get_quantization(module):
            case "8bit":
                yield f"{name}.weight", _get_row_scales(module)
            case "4bit":
                state = module.weight.quant_state
                scales = (state.state2.absmax, state.offset) if state.nested else (state.absmax,)
                yield from ((f"{name}.weight", own) for own in scales)


def get_quantization(linear: Any) -> str | None:
    """Return ``8bit`` or ``4bit`` for a base Linear whose weight is quantized, else None."""
    weight: Any = getattr(linear, "weight", None)
    # By name, so that a plain model never imports bitsandbytes.
    match type(weight).__name__:
        case "Int8Params" if weight.dtype == torch.int8:
            return "8bit"
        case "Params4bit" if weight.quant_state is not None:
            return "4bit"
    return None


def get_weight_shape(linear: Any) -> tuple[int, int]:
    """Return (out, in) of a base Linear's weight; a 4-bit weight is stored packed."""
    weight = linear.weight
    shape = weight.quant_state.shape if get_quantization(linear) == "4bit" else weight.shape
    return shape[0], shape[1]


def read_weight(linear: Any) -> Tensor:
    """Read the weight of a base Linear, quantized or not.

    A 4-bit weight is not rounded to the dtype that it is computed in.

    Args:
        linear: ``nn.Linear`` of any floating dtype, or bitsandbytes' ``Linear8bitLt`` or
            ``Linear4bit`` (not the LoRA wrapper around it).

    Returns:
        Shape (out, in), on the device of the weight. Of a plain Linear it is the weight itself,
        else a new tensor in float32.

    Raises:
        ValueError: A 4-bit weight was repacked for inference.
    """
    kind, weight = get_quantization(linear), linear.weight.detach()
    if kind is None:
        return weight
    functional = import_bitsandbytes().functional
    if kind == "8bit":
        return functional.int8_vectorwise_dequant(weight, _get_row_scales(linear))
    state = copy.copy(linear.weight.quant_state)
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            "a 4-bit weight was repacked for inference on this CPU; load the model with load_model"
        )
    shape = state.shape
    # As one long row, whose blocks the kernels for all CPUs find: see ``check_4bit_widths``.
    state.shape, state.dtype = torch.Size((shape.numel(),)), torch.float32
    return functional.dequantize_4bit(weight, state).view(shape)


def _get_row_scales(linear: Any) -> Tensor:
    """Return the scales of an 8-bit weight, shape (out,): the first forward moves them."""
    scales = linear.weight.SCB
    return linear.state.SCB if scales is None else scales


def cut_quantized(linear: Any, *, dim: int, index: Tensor) -> None:
    """Cut rows or columns out of an 8-bit weight; what stays keeps its codes and its scales.

    A row's scale is that of the whole row, so a weight that stays is the same number as before,
    though a cut row quantized anew might be a little finer. Call it between a backward and the
    next forward: bitsandbytes keeps the weight of a forward for its backward outside the graph.

    Args:
        linear: ``Linear8bitLt``, before or after its first forward.
        dim: 0 for rows, 1 for columns.
        index: Kept positions, int64, on the device of the weight, shape (kept,).

    Raises:
        ValueError: The weight is 4-bit.
    """
    if get_quantization(linear) != "8bit":
        raise ValueError(
            "4-bit weights share scales across rows and cannot be cut in place; "
            "mask their groups instead"
        )
    scales = _get_row_scales(linear)
    codes = linear.weight.data.index_select(dim, index).contiguous()
    scales = scales.index_select(0, index) if dim == 0 else scales
    # As a layer is before its first forward, which takes both over into ``state``.
    linear.weight = import_bitsandbytes().nn.Int8Params(
        codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales
    )
    linear.state.reset_grads()
