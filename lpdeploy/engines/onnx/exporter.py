"""A checkpoint as an ONNX graph with a KV cache.

torch's exporter is met here and nowhere else, but for the operator that ``traced.py`` writes.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from lpdeploy.engines.contract import Contract, TensorSpec, save_contract
from lpdeploy.engines.exporting import (
    carry_settings,
    check_max_batch,
    check_no_dynamic_rope,
    describe_files,
    describe_model,
    describe_source,
    resolve_max_seq_len,
)
from lpdeploy.engines.onnx import ENGINE
from lpdeploy.engines.onnx.traced import SCATTER_OPSET, ConcatModel, InPlaceModel
from lpdeploy.engines.torch.runner import load_model_with_adapter
from lpdeploy.environment import set_variable
from lpdeploy.errors import LpdeployError, OptionError
from lpdeploy.families.groups import get_head_dim
from lpdeploy.folders import atomic_folder
from lpdeploy.machine import list_versions
from lpdeploy.models.loading import load_config
from lpdeploy.models.shapes import list_widths
from lpdeploy.run_folder import EXPORT

SUPPORTED_OPSETS = range(18, 24)  # what torch's exporter writes: no less, and nothing newer yet

# 23 has Attention, RMSNormalization and RotaryEmbedding as operators. Median speed over 18 in ONNX
# Runtime 1.31 (two busy CPU cores, November 2026; 6 layers of width 768, fp32): prefill of 512
# tokens 1.06 to 1.11; decode 1.2 to 1.5 with 12 KV heads and 1.2 to 2.0 with 4, since the Attention
# operator takes grouped KV heads as they are, where 18 copies the cache for every query head. Both
# are equally close to torch. 23 needs ONNX Runtime 1.23; an older server needs opset 18.
DEFAULT_OPSET = 23
_GROUPED_ATTENTION_OPSET = 23

_CACHE_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_TOKEN_INPUTS = ("input_ids", "attention_mask", "position_ids")
WRITE_INDICES = "write_indices"


def export_onnx(  # noqa: PLR0913 - one keyword an option of the command
    model_folder: Path,
    output: Path,
    *,
    precision: str = "fp32",
    opset: int | None = None,
    adapter: Path | None = None,
    max_batch: int = 8,
    max_seq_len: int | None = None,
    in_place: bool = False,
    overwrite: bool = False,
) -> Contract:
    """Export a checkpoint with KV cache in and out, and dynamic batch, sequence and past.

    Writes a folder that needs nothing else: ``model.onnx``, ``model.onnx.data`` (all weights, so
    that size does not matter), ``io.json``, config and tokenizer. Inputs are ``input_ids``,
    ``attention_mask``, ``position_ids`` and ``past_key_values.N.key`` / ``.value`` of shape
    (B, kv_heads_N, P, head_dim), where P may be 0; outputs are ``logits`` and
    ``present.N.key`` / ``.value``.

    Args:
        model_folder: A Hugging Face folder, stock or of per-layer widths.
        output: The folder to write.
        precision: ``fp32``, ``fp16`` or ``bf16``: of weights, activations and cache. Norms and
            rotary angles are computed in float32 as in transformers, and logits are float32.
        opset: 18 to 23; None for the default.
        adapter: A peft adapter that stays beside the weights, as two more products a projection.
        max_batch: Largest batch to be served. The graph itself has no limit; engines and servers
            that are built from it read this.
        max_seq_len: Longest past + present to be served, likewise; None for 2048 or the model's
            positions, whichever is less.
        in_place: Past and present are buffers of ``max_seq_len`` positions that a runtime may
            keep in one place: ``write_indices`` (B,) says where a call's tokens go, and
            ``attention_mask`` is as long as the buffers. Opset 24.
        overwrite: Replace what is at ``output``.

    Returns:
        The contract, as ``io.json`` holds it.

    Raises:
        ArtifactError: ``output`` exists, or the model or adapter cannot be loaded.
        OptionError: An option is out of range.
    """
    config = load_config(model_folder)
    default = SCATTER_OPSET if in_place else DEFAULT_OPSET
    opset = default if opset is None else opset
    ENGINE.check_options({"precision": precision})
    _check_opset(opset, in_place=in_place)
    check_no_dynamic_rope(config)
    check_max_batch(max_batch)
    max_seq_len = resolve_max_seq_len(max_seq_len, config)
    buffer = max_seq_len if in_place else None
    with atomic_folder(output, kind=EXPORT, overwrite=overwrite) as folder:
        model = load_model_with_adapter(model_folder, dtype=precision, adapter=adapter)
        _save_graph(model, folder / "model.onnx", opset=opset, buffer=buffer)
        carry_settings(model_folder, folder)
        inputs, outputs = _describe_tensors(config, precision, buffer)
        contract = Contract(
            engine=ENGINE.name,
            precision=precision,
            opset=opset,
            merged=adapter is None,
            inputs=inputs,
            outputs=outputs,
            model=describe_model(config, model_folder),
            max_batch=max_batch,
            max_seq_len=max_seq_len,
            source=describe_source(model_folder, adapter),
            files=describe_files(folder, "model.onnx*"),
            versions=list_versions(),
        )
        save_contract(contract, folder, ENGINE)
    return contract


def _check_opset(opset: int, *, in_place: bool) -> None:
    if in_place and opset != SCATTER_OPSET:
        raise OptionError(
            f"`opset` {opset} is not supported with a cache that is written in place; it must be "
            f"{SCATTER_OPSET}. Leave it out."
        )
    if not in_place and opset not in SUPPORTED_OPSETS:
        raise OptionError(
            f"`opset` {opset} is not supported; it must be {SUPPORTED_OPSETS[0]} to "
            f"{SUPPORTED_OPSETS[-1]}. Leave it out for {DEFAULT_OPSET}."
        )


def _save_graph(model: nn.Module, path: Path, *, opset: int, buffer: int | None) -> None:
    config: Any = model.config
    model.requires_grad_(requires_grad=False)
    inputs, outputs = _list_names(config, in_place=buffer is not None)
    traced = ConcatModel(model) if buffer is None else InPlaceModel(model)
    with _quiet(), _grouped_attention(enabled=opset >= _GROUPED_ATTENTION_OPSET), torch.no_grad():
        program = torch.onnx.export(
            traced.eval(),
            _build_example(model, buffer),
            dynamo=True,
            dynamic_shapes=_build_dynamic_shapes(config, in_place=buffer is not None),
            input_names=inputs,
            output_names=outputs,
            opset_version=opset,
            verbose=False,
        )
        assert program is not None
        _apply_names(program.model.graph, total="total" if buffer is None else None)
        program.save(path, external_data=True)
    _check_graph(path, opset=opset)


def _check_graph(path: Path, *, opset: int) -> None:
    import onnx

    written = onnx.load(path, load_external_data=False).opset_import[0].version
    if written != opset:  # the exporter only logs that it could not convert
        raise LpdeployError(
            f"The exporter wrote opset {written} and could not convert it to {opset}. "
            f"Leave `opset` out for {DEFAULT_OPSET}."
        )
    onnx.checker.check_model(path)  # by its path: also right above 2 GB


def _list_names(config: PretrainedConfig, *, in_place: bool) -> tuple[list[str], list[str]]:
    parts = [f"{n}.{part}" for n in range(config.num_hidden_layers) for part in ("key", "value")]
    caches = [f"past_key_values.{part}" for part in parts]
    inputs = [*_TOKEN_INPUTS, *([WRITE_INDICES] if in_place else []), *caches]
    return inputs, ["logits", *(f"present.{part}" for part in parts)]


def _build_example(model: nn.Module, buffer: int | None) -> tuple[Any, ...]:
    # Every dynamic dimension is 2 or more, and no two are alike: torch.export takes 0 and 1 for
    # constants, and equal sizes for one size.
    batch, tokens, past = 2, 3, 5
    config: Any = model.config
    head_dim = get_head_dim(config)
    dtype = model.get_input_embeddings().weight.dtype  # type: ignore[operator]
    caches = [
        torch.zeros(batch, width.kv_heads, buffer or past, head_dim, dtype=dtype)
        for width in list_widths(config)
        for _ in ("key", "value")
    ]
    ids = torch.zeros(batch, tokens, dtype=torch.int64)
    mask = torch.ones(batch, buffer or past + tokens, dtype=torch.int64)
    positions = torch.arange(past, past + tokens).repeat(batch, 1)  # (T,) -> (B, T)
    write_indices = [] if buffer is None else [torch.full((batch,), past)]
    return ids, mask, positions, *write_indices, caches


def _build_dynamic_shapes(config: PretrainedConfig, *, in_place: bool) -> tuple[Any, ...]:
    tokens, batch = {0: "batch", 1: "sequence"}, {0: "batch"}
    caches = 2 * config.num_hidden_layers
    if in_place:
        return tokens, batch, tokens, batch, [batch] * caches
    # The mask's length is past + sequence, which torch.export finds out by itself.
    return tokens, {0: "batch", 1: "total"}, tokens, [{0: "batch", 2: "past"}] * caches


def _apply_names(graph: Any, *, total: str | None) -> None:
    """Give past + sequence a name in the outputs too, and drop stack traces of this machine."""
    for value in graph.outputs[1:] if total else ():
        value.shape[2] = total
    for node in graph.all_nodes():
        node.metadata_props.clear()
    graph.metadata_props.clear()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's warnings and log lines below an error."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _grouped_attention(*, enabled: bool) -> Iterator[None]:
    # transformers repeats the KV heads before attention where torch's kernels are slower with
    # grouped ones; the Attention operator takes them grouped. Its switch is an environment
    # variable; were it gone, the graph would be slower and still right.
    with set_variable("TRANSFORMERS_SDPA_FORCE_GQA", "1" if enabled else None):
        yield


def _describe_tensors(
    config: PretrainedConfig, precision: str, buffer: int | None
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Return the inputs and outputs of the graph; a string is a dynamic dimension."""
    head_dim, dtype = get_head_dim(config), _CACHE_DTYPES[precision]
    past, total = buffer or "past", buffer or "total"

    def describe_cache(prefix: str, length: int | str) -> list[TensorSpec]:
        return [
            TensorSpec(
                f"{prefix}.{layer}.{part}", dtype, ("batch", width.kv_heads, length, head_dim)
            )
            for layer, width in enumerate(list_widths(config))
            for part in ("key", "value")
        ]

    lengths = {"attention_mask": total}
    tokens = [
        TensorSpec(name, "int64", ("batch", lengths.get(name, "sequence")))
        for name in _TOKEN_INPUTS
    ]
    if buffer is not None:
        tokens.append(TensorSpec(WRITE_INDICES, "int64", ("batch",)))
    logits = TensorSpec("logits", "float32", ("batch", "sequence", config.vocab_size))
    return (
        (*tokens, *describe_cache("past_key_values", past)),
        (logits, *describe_cache("present", total)),
    )
