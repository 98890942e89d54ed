"""Qwen2: a LLaMA with biases on queries, keys and values."""

from functools import partial

from lpdeploy.families.record import GGUF_LLAMA, PER_LAYER_MODULE, Family, import_classes

QWEN2 = Family(
    model_type="qwen2",
    load_classes=partial(import_classes, "transformers", "Qwen2"),
    load_per_layer_classes=partial(import_classes, PER_LAYER_MODULE, "PerLayerQwen2"),
    biased=("q_proj", "k_proj", "v_proj"),
    # llama.cpp's own `qwen2` wants as many query rows as the hidden size, which a model without
    # some of its heads does not have. Its `llama` may have biases.
    gguf=GGUF_LLAMA,
)
