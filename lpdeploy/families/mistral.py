"""Mistral: a LLaMA without biases, with a sliding window."""

from functools import partial

from lpdeploy.families.record import GGUF_LLAMA, PER_LAYER_MODULE, Family, import_classes

MISTRAL = Family(
    model_type="mistral",
    load_classes=partial(import_classes, "transformers", "Mistral"),
    load_per_layer_classes=partial(import_classes, PER_LAYER_MODULE, "PerLayerMistral"),
    biased=(),
    gguf=GGUF_LLAMA,
)
