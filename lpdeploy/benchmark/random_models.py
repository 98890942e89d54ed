"""Checkpoints of a shape with random weights: latency depends on the shape alone."""

from pathlib import Path
from typing import Any

import torch

from lpdeploy.models.adapters import attach_lora, get_lora_weights
from lpdeploy.models.groups import list_group_specs
from lpdeploy.models.loading import get_model_classes


def save_random_model(config: Any, folder: Path, *, seed: int = 0) -> Path:
    """Save a checkpoint of a config, without a tokenizer.

    Args:
        config: Of a supported model type.
        folder: Where to.
        seed: Of the weights.

    Returns:
        ``folder``.
    """
    torch.manual_seed(seed)
    _, model_class = get_model_classes(config.model_type)
    model_class(config).save_pretrained(folder)
    return folder


def fill_random_adapter(model: Any, *, rank: int, alpha: float) -> Any:
    """Put random LoRA beside every projection; its values cost the same as trained ones.

    Args:
        model: A transformers causal LM; it is wrapped, and of no use by itself afterwards.
        rank: Of the adapter.
        alpha: ``scaling * rank``.

    Returns:
        The ``PeftModel``.
    """
    wrapped = attach_lora(model, rank=rank, alpha=alpha, dropout=0.0, seed=0)
    with torch.no_grad():
        for spec in list_group_specs(model.config):
            for piece in spec.slices:
                get_lora_weights(model.get_submodule(piece.module)).lora_b.normal_(std=0.01)
    return wrapped


def save_random_adapter(model: Any, folder: Path, *, rank: int, alpha: float) -> Path:
    """Save such an adapter of a live model.

    Returns:
        ``folder``.
    """
    wrapped = fill_random_adapter(model, rank=rank, alpha=alpha)
    wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    return folder
