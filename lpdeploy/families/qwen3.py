"""Qwen3: a LLaMA that normalizes each query and key head before it is rotated.

One weight of the norm serves all heads, so removing heads leaves it as it is.
"""

from functools import partial

from lpdeploy.families.record import PER_LAYER_MODULE, Family, GgufArchitecture, import_classes

QWEN3 = Family(
    model_type="qwen3",
    load_classes=partial(import_classes, "transformers", "Qwen3"),
    load_per_layer_classes=partial(import_classes, PER_LAYER_MODULE, "PerLayerQwen3"),
    gguf=GgufArchitecture(name="QWEN3"),
)
