"""What ONNX Runtime GenAI asks of a folder that it opens: its config, and a graph of its own."""

from pathlib import Path
from typing import Any

import onnx_ir as ir
from transformers import PretrainedConfig

from lpdeploy.artifacts import save_json
from lpdeploy.engines.contract import Contract
from lpdeploy.families import get_family

_GRAPH = "genai.onnx"


def save_genai_files(folder: Path, config: PretrainedConfig, contract: Contract) -> bool:
    """Add ``genai_config.json`` and ``genai.onnx`` to an ``ort`` export.

    Args:
        folder: With ``model.onnx``; the new graph reads the same ``model.onnx.data``.
        config: The model's config.
        contract: What ``io.json`` says.

    Returns:
        Whether it could: GenAI knows one number of heads for all layers.
    """
    if len(set(contract.model.num_key_value_heads)) > 1:
        return False
    model = ir.load(folder / "model.onnx")
    apply_attention_mask(model)
    ir.save(model, folder / _GRAPH)
    save_json(folder / "genai_config.json", _build_genai_config(config, contract))
    return True


def apply_attention_mask(model: ir.Model) -> None:
    """Let a graph find the lengths of its rows in an attention mask, and give the last logits only.

    GenAI hands over ``attention_mask`` (B, total), whose row sums are the lengths, with padding on
    the right. It knows by the declared shape that a graph gives one token's logits.

    Args:
        model: What ``build_decoder`` built; its three inputs of lengths are replaced.
    """
    graph, tape = model.graph, ir.tape.Tape()
    inputs = {value.name: value for value in graph.inputs}
    mask = ir.Value(
        name="attention_mask",
        type=ir.TensorType(ir.DataType.INT64),
        shape=ir.Shape(("batch", "total")),
    )
    for name, found in _add_lengths(tape, mask, inputs["input_ids"]).items():
        ir.convenience.replace_all_uses_with(inputs[name], found)
        graph.inputs.remove(inputs[name])
    graph.inputs.insert(1, mask)
    graph.insert_before(graph[0], tape.nodes)
    for value in tape.initializers:
        graph.register_initializer(value)
    logits = graph.outputs[0]
    assert logits.shape is not None
    logits.shape = ir.Shape([logits.shape[0], 1, logits.shape[2]])


def _add_lengths(tape: ir.tape.Tape, mask: ir.Value, ids: ir.Value) -> dict[str, ir.Value]:
    """Compute what ``ort_graph.Lengths`` describes, for the last token of each row."""
    zero, one, axes = (
        tape.initializer(ir.tensor(value, dtype=ir.DataType.INT64, name=f"lengths_{name}"))
        for name, value in (("zero", 0), ("one", 1), ("axes", [1, 2]))
    )
    axis = tape.initializer(ir.tensor([1], dtype=ir.DataType.INT64, name="lengths_axis"))
    length = tape.op("ReduceSum", [mask, axis], {"keepdims": 0})  # (B, total) -> (B,)
    last = tape.op("Sub", [length, one])
    total = tape.op("Gather", [tape.op("Shape", [mask]), one])
    tokens = tape.op("Gather", [tape.op("Shape", [ids]), one])
    past = tape.op("Sub", [total, tokens])
    # Rows shorter than the longest have their one new token at 0 when they decode.
    newest = tape.op("Max", [tape.op("Sub", [last, past]), zero])
    as_int32 = {"to": ir.DataType.INT32.value}
    return {
        "seqlens_k": tape.op("Cast", [last], as_int32),
        "total_sequence_length": tape.op("Cast", [total], as_int32),
        "logits_positions": tape.op("Unsqueeze", [newest, axes]),  # (B,) -> (B, 1, 1)
    }


def _build_genai_config(config: PretrainedConfig, contract: Contract) -> dict[str, Any]:
    """Build ``genai_config.json`` for a model whose layers have the same number of heads."""
    stops = list(contract.model.eos_token_ids)
    bos = contract.model.bos_token_id
    family = get_family(config.model_type)
    return {
        "model": {
            "type": family.genai or family.model_type,
            "vocab_size": config.vocab_size,
            "context_length": contract.max_seq_len,
            "bos_token_id": bos if bos is not None else (stops or [0])[0],
            "eos_token_id": stops,
            "pad_token_id": config.pad_token_id
            if config.pad_token_id is not None
            else (stops or [0])[0],
            "decoder": {
                "session_options": {"provider_options": []},
                "filename": _GRAPH,
                "hidden_size": config.hidden_size,
                "head_size": contract.model.head_dim,
                "num_attention_heads": contract.model.num_attention_heads[0],
                "num_key_value_heads": contract.model.num_key_value_heads[0],
                "num_hidden_layers": contract.model.num_hidden_layers,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": contract.max_seq_len,
            "past_present_share_buffer": True,
        },
    }
