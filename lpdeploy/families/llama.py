"""LLaMA: the family that the others vary."""

from functools import partial

from lpdeploy.families.mistral import MISTRAL
from lpdeploy.families.record import GGUF_LLAMA, PER_LAYER_MODULE, Family, Fields, import_classes

_NOT_IN_MISTRAL = ("attention_bias", "mlp_bias", "pretraining_tp")


def carry_odd_heads(values: Fields) -> tuple[str, Fields] | None:
    """State a LLaMA as a Mistral.

    transformers' ``LlamaConfig`` refuses a hidden size that the head count does not divide, even
    with an explicit ``head_dim``. ``MistralConfig`` without a sliding window is the same
    computation and has no such check. Mistral has no biases, so a LLaMA with biases has no stock
    class.
    """
    if values["attention_bias"] or values["mlp_bias"]:
        return None
    kept = {name: value for name, value in values.items() if name not in _NOT_IN_MISTRAL}
    return MISTRAL.model_type, {**kept, "sliding_window": None}


LLAMA = Family(
    model_type="llama",
    load_classes=partial(import_classes, "transformers", "Llama"),
    load_per_layer_classes=partial(import_classes, PER_LAYER_MODULE, "PerLayerLlama"),
    carry_odd_heads=carry_odd_heads,
    gguf=GGUF_LLAMA,
)
