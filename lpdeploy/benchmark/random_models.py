"""Models of a shape with random weights: time and memory depend on the shape alone."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from lpdeploy.families.groups import LINEARS, list_group_specs
from lpdeploy.models.adapters import attach_lora, get_lora_weights
from lpdeploy.models.loading import DTYPES, get_model_classes
from lpdeploy.models.quantized import apply_training_layout, build_random_8bit


def save_random_model(
    config: PretrainedConfig, folder: Path, *, dtype: str = "fp32", seed: int = 0
) -> Path:
    """Save a checkpoint of a config, without a tokenizer.

    Args:
        config: Of a supported model type.
        folder: Where to.
        dtype: Of the weights: ``fp32``, ``fp16`` or ``bf16``.
        seed: Of the weights.

    Returns:
        ``folder``.
    """
    from transformers import GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # a bar of ours or none
    torch.manual_seed(seed)
    model = build_random_model(config, dtype=dtype, device="cpu")
    model.generation_config = GenerationConfig()
    model.save_pretrained(folder)
    return folder


def build_random_model(
    config: PretrainedConfig, *, dtype: str, device: str, load_in: str | None = None
) -> Any:
    """Build a model on its device, a module at a time, so that nothing larger than it is made.

    Args:
        config: Of a supported model type.
        dtype: ``fp32``, ``fp16`` or ``bf16``.
        device: ``cpu``, ``cuda``.
        load_in: ``8bit`` for 8-bit projections, or None.

    Returns:
        A transformers causal LM, as ``load_model`` gives it.

    Raises:
        ValueError: ``load_in`` is ``4bit``.
    """
    if load_in not in (None, "8bit"):
        raise ValueError(f"load_in is {load_in!r}; random weights come in full or in 8bit")
    _, model_class = get_model_classes(config.model_type)
    with torch.device("meta"):
        model = model_class(config)
    for name, module in list(model.named_modules()):
        if load_in and name.rsplit(".", 1)[-1] in LINEARS:
            made = build_random_8bit(module, device=device)
            if made.bias is not None:
                bias = torch.zeros(len(made.bias), dtype=DTYPES[dtype], device=device)
                made.bias = nn.Parameter(bias, requires_grad=False)
            model.set_submodule(name, made)
        else:
            _fill(module, dtype=DTYPES[dtype], device=device)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config).to(device)  # its buffers are computed
    model.tie_weights()
    model.generation_config = None
    if load_in:
        model.is_loaded_in_8bit = True  # what peft looks at
        apply_training_layout(model)
    return model.eval()


def _fill(module: nn.Module, *, dtype: torch.dtype, device: str) -> None:
    """Make a module's own parameters: norms of ones, the others of an untrained model."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        values = torch.ones(parameter.shape, dtype=dtype, device=device)
        if parameter.dim() > 1:
            values.normal_(std=0.02)
        setattr(module, name, nn.Parameter(values, requires_grad=False))


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
