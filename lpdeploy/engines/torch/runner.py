"""A transformers model, merged or with LoRA beside it, behind the Runner protocol."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lpdeploy.engines.runner import Output, compute_position_ids
from lpdeploy.engines.torch import ENGINE
from lpdeploy.errors import ArtifactError
from lpdeploy.models.adapters import load_adapter, load_unmerged
from lpdeploy.models.loading import PRECISIONS, load_config, load_model, resolve_dtype


class TorchRunner:
    """A causal LM of transformers, or a ``PeftModel`` around one.

    Attributes:
        name: ``torch``.
        precision: That of the embedding: ``fp32``, ``fp16`` or ``bf16``.
        vocab_size: Width of the logits.
        max_positions: Longest past + present in tokens.
        model: The model, in eval mode.
        config: Its transformers config.
    """

    name = ENGINE.name

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self.config = model.config
        weight = model.get_input_embeddings().weight
        self.precision = PRECISIONS[weight.dtype]
        self.vocab_size: int = self.config.vocab_size
        self.max_positions: int = self.config.max_position_embeddings
        self._device = weight.device

    @torch.inference_mode()
    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor,
        past: Any = None,
        last_only: bool = False,
        reserve: int = 0,  # noqa: ARG002 - its cache is no buffer
    ) -> Output:
        """Run T new tokens after a past of P tokens.

        Args:
            input_ids: Shape (B, T), int64, on any device.
            attention_mask: Shape (B, P + T), int64; 0 at padding, which stands on the left.
            past: ``Output.past`` of a previous call, or None for a prefill. It is left as it is,
                so several calls may go on from the same past.
            last_only: Compute only the logits of the last token.
            reserve: Without effect.

        Returns:
            Logits, float32, on the model's device, and the ``DynamicCache``.
        """
        mask = attention_mask.to(self._device)
        output = self.model(
            input_ids=input_ids.to(self._device),
            attention_mask=mask,
            position_ids=compute_position_ids(mask, input_ids.shape[1]),
            past_key_values=None if past is None else _fork(past),
            use_cache=True,
            logits_to_keep=1 if last_only else 0,
        )
        return Output(output.logits.float(), output.past_key_values)


def _fork(cache: Any) -> Any:
    # A DynamicCache grows in place, by putting new tensors where the old ones were; sharing the
    # tensors but not the layers that hold them costs nothing and keeps the caller's cache.
    fork = copy.copy(cache)
    fork.layers = [copy.copy(layer) for layer in cache.layers]
    return fork


def load_torch_runner(
    folder: Path, *, dtype: str = "auto", device: str = "cpu", adapter: Path | None = None
) -> TorchRunner:
    """Load a checkpoint, and an adapter beside it where one is given.

    Args:
        folder: A Hugging Face model folder.
        dtype: ``fp32``, ``fp16``, ``bf16``, or ``auto``: what ``resolve_dtype`` says.
        device: ``cpu``, ``cuda``, ``cuda:1``.
        adapter: A peft adapter that stays unmerged.

    Raises:
        ArtifactError: The model or the adapter cannot be loaded, or do not fit each other.
    """
    precision = resolve_dtype(dtype, load_config(folder), device=device)
    model = load_model_with_adapter(folder, dtype=precision, device=device, adapter=adapter)
    return TorchRunner(model)


def load_model_with_adapter(
    folder: Path, *, dtype: str, device: str = "cpu", adapter: Path | None = None
) -> Any:
    """Load a model in one precision, LoRA included.

    Returns:
        The transformers model, or the ``PeftModel`` around it; in eval mode.

    Raises:
        ArtifactError: The model or the adapter cannot be loaded, or do not fit each other.
    """
    model = load_model(folder, dtype=dtype, device=device)
    if adapter is None:
        return model
    load_adapter(adapter)  # refuses an unreadable one with a sentence
    try:
        wrapped = load_unmerged(model, adapter).to(device)
    except (RuntimeError, ValueError) as error:  # a shape or a module name of another model
        raise ArtifactError(
            f"The adapter '{adapter}' does not fit the model '{folder}'. "
            "Give the base that it was trained on, cut to the same plan."
        ) from error
    precision = model.get_input_embeddings().weight.dtype
    # peft keeps LoRA in float32 beside a half-precision base. Parameters only: a cast of the
    # whole module would round the rotary frequencies, which transformers keeps in float32.
    for parameter in wrapped.parameters():
        parameter.data = parameter.data.to(precision)
    return wrapped
