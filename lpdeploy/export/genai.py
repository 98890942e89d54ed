"""What ONNX Runtime GenAI asks of a folder that it opens: its config, and a graph of its own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from lpdeploy.artifacts import save_json
from lpdeploy.export.ort_graph import fix_logits_offsets

_GRAPH = "genai.onnx"


def save_genai_files(folder: Path, config: Any, contract: Mapping[str, Any]) -> bool:
    """Add ``genai_config.json`` and ``genai.onnx`` to an ``ort`` export.

    Args:
        folder: With ``model.onnx``; the new graph reads the same ``model.onnx.data``.
        config: The model's config.
        contract: What ``io.json`` says.

    Returns:
        Whether it could: GenAI knows one number of heads for all layers.
    """
    if len(set(contract["num_key_value_heads"])) > 1:
        return False
    model = ir.load(folder / "model.onnx")
    fix_logits_offsets(model)
    ir.save(model, folder / _GRAPH)
    save_json(folder / "genai_config.json", build_genai_config(config, contract))
    return True


def build_genai_config(config: Any, contract: Mapping[str, Any]) -> dict[str, Any]:
    """Build ``genai_config.json`` for a model whose layers have the same number of heads."""
    stops = contract["eos_token_ids"]
    bos = contract["bos_token_id"]
    return {
        "model": {
            "type": config.model_type.removeprefix("lpdeploy_"),
            "vocab_size": config.vocab_size,
            "context_length": contract["max_seq_len"],
            "bos_token_id": bos if bos is not None else (stops or [0])[0],
            "eos_token_id": stops,
            "pad_token_id": config.pad_token_id
            if config.pad_token_id is not None
            else (stops or [0])[0],
            "decoder": {
                "session_options": {"provider_options": []},
                "filename": _GRAPH,
                "hidden_size": config.hidden_size,
                "head_size": contract["head_dim"],
                "num_attention_heads": contract["num_attention_heads"][0],
                "num_key_value_heads": contract["num_key_value_heads"][0],
                "num_hidden_layers": contract["num_hidden_layers"],
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
            "max_length": contract["max_seq_len"],
            "past_present_share_buffer": True,
        },
    }
