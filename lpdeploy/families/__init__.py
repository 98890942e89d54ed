"""The model families: what each has that the others lack, one record a family.

A family is a record in a file of its own, listed in the tuple below. To add one from outside the
package, put a ``Family`` into ``FAMILIES`` under the ``model_type`` of its config.
"""

from lpdeploy.families.llama import LLAMA
from lpdeploy.families.mistral import MISTRAL
from lpdeploy.families.qwen2 import QWEN2
from lpdeploy.families.qwen3 import QWEN3
from lpdeploy.families.record import Family, GgufArchitecture

__all__ = ["FAMILIES", "Family", "GgufArchitecture", "get_family", "is_per_layer", "name_per_layer"]

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)
}
"""``model_type`` of a stock config -> family. It is looked up whenever it is needed."""

_PER_LAYER_PREFIX = "lpdeploy_"


def is_per_layer(model_type: str) -> bool:
    """Tell whether a config of this type states the widths of each layer by itself."""
    return model_type.startswith(_PER_LAYER_PREFIX)


def name_per_layer(model_type: str) -> str:
    """Return the model type of a family's class whose layers differ."""
    return _PER_LAYER_PREFIX + model_type


def get_family(model_type: str) -> Family:
    """Return the family of a stock or per-layer model type.

    Raises:
        KeyError: There is none; ``load_config`` refuses such a model.
    """
    return FAMILIES[model_type.removeprefix(_PER_LAYER_PREFIX)]
