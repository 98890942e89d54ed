"""A checkpoint for ONNX Runtime alone: its own operators, packed weights, GenAI's config."""

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import torch

from lpdeploy.engines.contract import Contract, PackingRecord, TensorSpec, save_contract
from lpdeploy.engines.exporting import (
    carry_settings,
    check_max_batch,
    describe_files,
    describe_model,
    describe_source,
    resolve_max_seq_len,
)
from lpdeploy.engines.ort import ENGINE
from lpdeploy.engines.ort.genai import save_genai_files
from lpdeploy.engines.ort.graph import OPSET, build_decoder
from lpdeploy.engines.ort.weights import BlockFormat, Weights
from lpdeploy.errors import LpdeployError, OptionError
from lpdeploy.folders import atomic_folder
from lpdeploy.machine import list_versions
from lpdeploy.models.loading import load_config
from lpdeploy.run_folder import EXPORT

_ACTIVATIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_BITS = {"int8": 8, "int4": 4}
BLOCK_SIZES = (16, 32, 64, 128, 256)


def export_ort(  # noqa: PLR0913 - one keyword an option of the command
    model_folder: Path,
    output: Path,
    *,
    precision: str = "fp32",
    activations: str | None = None,
    block_size: int = 32,
    adapter: Path | None = None,
    max_batch: int = 8,
    max_seq_len: int | None = None,
    overwrite: bool = False,
) -> Contract:
    """Export a checkpoint for ONNX Runtime alone, as fast as it runs it.

    Writes a folder that needs nothing else: ``model.onnx``, ``model.onnx.data``, ``io.json``,
    config, tokenizer and, where every layer has the same number of heads, ``genai.onnx`` (over the
    same data) and ``genai_config.json``, so that ONNX Runtime GenAI opens the folder as it is.
    ``OrtRunner`` runs all of them.

    Args:
        model_folder: A Hugging Face folder, stock or of per-layer widths.
        output: The folder to write.
        precision: ``fp32``, ``fp16``, ``bf16``, or ``int8`` or ``int4`` for weights alone.
        activations: Beside int8 and int4 weights: ``fp32`` (the default, and the fast one on a
            CPU), ``fp16`` or ``bf16`` (on a GPU).
        block_size: Weights of a row that share a scale in int8 and int4.
        adapter: A peft adapter that stays beside the weights.
        max_batch: Largest batch to be served, for servers that ask.
        max_seq_len: Longest past + present; the tables of rotary angles are that long. None for
            2048 or the model's positions, whichever is less.
        overwrite: Replace what is at ``output``.

    Returns:
        The contract, as ``io.json`` holds it.

    Raises:
        ArtifactError: ``output`` exists, or the model or adapter cannot be loaded.
        OptionError: An option is out of range.
        LpdeployError: A block does not fit a width.
    """
    config = load_config(model_folder)
    ENGINE.check_options({"precision": precision})
    check_max_batch(max_batch)
    dtype = _resolve_activations(precision, activations)
    quantization = _resolve_blocks(precision, block_size)
    max_seq_len = resolve_max_seq_len(max_seq_len, config)
    with atomic_folder(output, kind=EXPORT, overwrite=overwrite) as folder:
        weights = Weights(model_folder, dtype=getattr(torch, dtype), adapter=adapter)
        graph = build_decoder(
            config, weights, dtype=dtype, max_seq_len=max_seq_len, quantization=quantization
        )
        _save_graph(graph, folder / "model.onnx")
        carry_settings(model_folder, folder)
        contract = Contract(
            engine=ENGINE.name,
            precision=precision,
            opset=OPSET,
            merged=adapter is None,
            inputs=tuple(_describe_value(value) for value in graph.graph.inputs),
            outputs=tuple(_describe_value(value) for value in graph.graph.outputs),
            model=describe_model(config, model_folder),
            max_batch=max_batch,
            max_seq_len=max_seq_len,
            source=describe_source(model_folder, adapter),
            files=describe_files(folder, "model.onnx*"),
            versions=list_versions(),
        )
        genai = save_genai_files(folder, config, contract)
        packing = PackingRecord(quantization.block_size if quantization else None, genai)
        contract = replace(contract, packing=packing)
        save_contract(contract, folder, ENGINE)
    return contract


def _resolve_activations(precision: str, activations: str | None) -> str:
    if activations is not None and precision in _ACTIVATIONS:
        raise OptionError(
            f"`activations` {activations} goes with int8 or int4 weights only; `precision` "
            f"{precision} sets both. Leave `activations` out."
        )
    return _ACTIVATIONS[activations or ("fp32" if precision in _BITS else precision)]


def _resolve_blocks(precision: str, block_size: int) -> BlockFormat | None:
    if precision not in _BITS:
        return None
    if block_size not in BLOCK_SIZES:
        raise OptionError(
            f"`block_size` {block_size} is not a block that ONNX Runtime packs. "
            f"Use {', '.join(map(str, BLOCK_SIZES))}."
        )
    return BlockFormat(_BITS[precision], block_size)


def _save_graph(graph: ir.Model, path: Path) -> None:
    """Write a graph, whose weights are read meanwhile.

    Raises:
        LpdeployError: A weight cannot be read, or not in the precision of the graph.
    """
    try:
        ir.save(graph, path, external_data=f"{path.name}.data")
    except ir.serde.SerdeError as error:
        cause: BaseException | None = error
        while cause and not isinstance(cause, LpdeployError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise cause from None


def _describe_value(value: ir.Value) -> TensorSpec:
    assert value.name is not None
    assert value.shape is not None
    assert value.dtype is not None
    names = {ir.DataType.FLOAT: "float32"}
    shape = tuple(size if isinstance(size, int) else str(size.value) for size in value.shape)
    dtype = names.get(value.dtype, value.dtype.name.lower())
    return TensorSpec(value.name, dtype, shape)
