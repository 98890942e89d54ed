"""The criteria: by what groups are chosen, and what each costs.

A criterion is a record in a file of its own, listed in the tuple below. To add one from outside the
package, put a ``Criterion`` into ``CRITERIA`` before the options that name it are made.
"""

from lpdeploy.criteria.gate import GATE
from lpdeploy.criteria.gradient import GRADIENT
from lpdeploy.criteria.lora import LORA
from lpdeploy.criteria.magnitude import MAGNITUDE
from lpdeploy.criteria.obs import OBS
from lpdeploy.criteria.random import RANDOM
from lpdeploy.criteria.record import Criterion, ScoredLinear, ScoreRows
from lpdeploy.criteria.wanda import WANDA

__all__ = ["CRITERIA", "Criterion", "ScoreRows", "ScoredLinear", "is_built_in"]

CRITERIA: dict[str, Criterion] = {
    criterion.name: criterion for criterion in (LORA, GATE, GRADIENT, OBS, MAGNITUDE, WANDA, RANDOM)
}
"""Name -> criterion. It is looked up whenever it is needed, so it may grow at any time."""
_OWN = tuple(CRITERIA.values())


def is_built_in(name: str) -> bool:
    """Tell whether a criterion is one of lpdeploy's own, which do not change between two runs."""
    return CRITERIA.get(name) in _OWN
