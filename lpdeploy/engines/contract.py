"""What an export says of itself, in ``io.json`` or ``engine.json``: written, read and checked."""

import shutil
from pathlib import Path
from typing import Any

from lpdeploy.artifacts import compute_sha256, load_json
from lpdeploy.engines.ort_session import FIX
from lpdeploy.errors import ArtifactError, LpdeployError
from lpdeploy.families.groups import get_head_dim
from lpdeploy.models.checkpoint import carry_files
from lpdeploy.models.loading import compute_model_sha256
from lpdeploy.models.shapes import list_widths

CONTRACT_VERSION = 1
DEFAULT_MAX_SEQ_LEN = 2048


def load_contract(
    folder: Path, *, engine: str, name: str = "io.json", fix: str = FIX
) -> dict[str, Any]:
    """Read what an export says of itself, and check that its files are whole.

    Args:
        folder: Of the export.
        engine: What the export must be for.
        name: The file that says it.
        fix: What a user does where the export cannot be used.

    Raises:
        ArtifactError: A file is missing, cut short, or of another export or engine.
    """
    contract = load_json(folder / name, fix=fix)
    if not isinstance(contract, dict) or contract.get("engine") != engine:
        raise ArtifactError(f"'{folder / name}' describes no export for {engine}. {fix}")
    version = contract.get("schema_version")
    if version != CONTRACT_VERSION:
        raise ArtifactError(
            f"'{folder / name}' has schema version {version!r}; this lpdeploy reads "
            f"{CONTRACT_VERSION}. {fix}"
        )
    for file, recorded in contract["files"].items():
        path = folder / file
        if not path.is_file():
            raise ArtifactError(f"No {file} in '{folder}'. {fix}")
        # The size tells a truncated copy at once; hashing gigabytes would double the loading.
        if path.stat().st_size != recorded["bytes"]:
            raise ArtifactError(
                f"'{path}' has {path.stat().st_size} bytes, its export had {recorded['bytes']}. "
                f"Copy it again, or: {fix}"
            )
    return contract


def resolve_max_seq_len(max_seq_len: int | None, config: Any) -> int:
    """Return the longest past + present to be served.

    Raises:
        LpdeployError: The model has fewer positions.
    """
    positions = config.max_position_embeddings
    if max_seq_len is None:
        return min(DEFAULT_MAX_SEQ_LEN, positions)
    if not 2 <= max_seq_len <= positions:
        raise LpdeployError(
            f"--max-seq-len {max_seq_len} does not fit a model of {positions} positions. "
            f"Use 2 to {positions}."
        )
    return max_seq_len


def carry_settings(model_folder: Path, folder: Path) -> None:
    """Copy config, tokenizer and generation config beside a graph."""
    carry_files(model_folder, folder)
    shutil.copyfile(model_folder / "config.json", folder / "config.json")


def describe_model(config: Any, model_folder: Path) -> dict[str, Any]:
    """Return the shape of a model and the tokens that end its text."""
    return {
        "model_type": config.model_type,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": [width.heads for width in list_widths(config)],
        "num_key_value_heads": [width.kv_heads for width in list_widths(config)],
        "head_dim": get_head_dim(config),
        "vocab_size": config.vocab_size,
        "max_positions": config.max_position_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_ids": _list_eos(config, model_folder),
    }


def _list_eos(config: Any, model_folder: Path) -> list[int]:
    """A generation config says more than a config: chat models end a turn with another token."""
    path = model_folder / "generation_config.json"
    own = load_json(path, fix="Copy the checkpoint anew.") if path.is_file() else {}
    stops = own.get("eos_token_id", config.eos_token_id)
    return stops if isinstance(stops, list) else [] if stops is None else [stops]


def describe_source(model_folder: Path, adapter: Path | None) -> dict[str, str | None]:
    """Return what an export was made from, with hashes."""
    return {
        "model": str(model_folder),
        "sha256": compute_model_sha256(model_folder),
        "adapter": None if adapter is None else str(adapter),
        "adapter_sha256": None if adapter is None else compute_adapter_sha256(adapter),
    }


def compute_adapter_sha256(adapter: Path) -> str:
    """Hash what an unmerged export takes from an adapter."""
    return compute_sha256(adapter, patterns=("adapter_model.safetensors", "adapter_config.json"))


def describe_files(folder: Path, pattern: str) -> dict[str, dict[str, Any]]:
    """Return size and hash of the files that are loaded."""
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": compute_sha256(path)}
        for path in sorted(folder.glob(pattern))
    }
