"""Helpers that exporters share: limits, the model's settings, and parts of the contract."""

import shutil
from pathlib import Path

from transformers import PretrainedConfig

from lpdeploy.artifacts import compute_sha256
from lpdeploy.engines.contract import FileRecord, ModelRecord, SourceRecord
from lpdeploy.errors import LpdeployError, OptionError
from lpdeploy.families.groups import get_head_dim
from lpdeploy.models.checkpoint import carry_files
from lpdeploy.models.generation import list_stop_tokens
from lpdeploy.models.loading import compute_model_sha256
from lpdeploy.models.shapes import list_widths

DEFAULT_MAX_SEQ_LEN = 2048
_MAX_BATCH = 65_536


def resolve_max_seq_len(max_seq_len: int | None, config: PretrainedConfig) -> int:
    """Return the longest past + present to be served.

    Raises:
        LpdeployError: The model has fewer positions.
    """
    positions = config.max_position_embeddings
    if max_seq_len is None:
        return min(DEFAULT_MAX_SEQ_LEN, positions)
    if not 2 <= max_seq_len <= positions:
        raise LpdeployError(
            f"`max_seq_len` {max_seq_len} does not fit a model of {positions} positions. "
            f"Use 2 to {positions}."
        )
    return max_seq_len


def carry_settings(model_folder: Path, folder: Path) -> None:
    """Copy config, tokenizer and generation config beside a graph."""
    carry_files(model_folder, folder)
    shutil.copyfile(model_folder / "config.json", folder / "config.json")


def check_max_batch(max_batch: int) -> None:
    """Check the largest batch to be served.

    Raises:
        OptionError: It is less than 1, or more than any server runs.
    """
    if not 1 <= max_batch <= _MAX_BATCH:
        raise OptionError(f"`max_batch` is {max_batch}; it must be from 1 to {_MAX_BATCH:,}.")


def describe_model(config: PretrainedConfig, model_folder: Path) -> ModelRecord:
    """Return the shape of a model and the tokens that start and end its text."""
    widths = list_widths(config)
    return ModelRecord(
        model_type=config.model_type,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=tuple(width.heads for width in widths),
        num_key_value_heads=tuple(width.kv_heads for width in widths),
        head_dim=get_head_dim(config),
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        bos_token_id=config.bos_token_id,
        eos_token_ids=list_stop_tokens(model_folder, config),
    )


def get_rope_type(config: PretrainedConfig) -> str:
    """Return how positions are rotated: ``default``, ``llama3``, ``yarn`` and so on."""
    return (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")


def check_no_dynamic_rope(config: PretrainedConfig) -> None:
    """Refuse rotary positions that are recomputed while a text grows, which no graph can say.

    Raises:
        LpdeployError: The model has them.
    """
    if get_rope_type(config) == "dynamic":
        raise LpdeployError(
            "No export takes rotary positions of type 'dynamic', which change while a text grows. "
            "Serve the checkpoint itself, or set another rope_type in its config.json."
        )


def describe_source(model_folder: Path, adapter: Path | None) -> SourceRecord:
    """Return what an export was made from, with hashes."""
    return SourceRecord(
        model=str(model_folder),
        sha256=compute_model_sha256(model_folder),
        adapter=None if adapter is None else str(adapter),
        adapter_sha256=None if adapter is None else compute_adapter_sha256(adapter),
    )


def compute_adapter_sha256(adapter: Path) -> str:
    """Hash what an unmerged export takes from an adapter."""
    return compute_sha256(adapter, patterns=("adapter_model.safetensors", "adapter_config.json"))


def describe_files(folder: Path, pattern: str) -> dict[str, FileRecord]:
    """Return size and hash of the files that are loaded."""
    return {
        path.name: FileRecord(path.stat().st_size, compute_sha256(path))
        for path in sorted(folder.glob(pattern))
    }
