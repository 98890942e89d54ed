"""No knowledge at all: what every other criterion has to beat."""

from typing import TYPE_CHECKING

from lpdeploy.criteria.record import Criterion

if TYPE_CHECKING:
    from torch import Tensor


def draw(groups: int) -> "Tensor":
    """Draw scores, the same in a resumed run, since training seeds by the step."""
    import torch

    return torch.rand(groups)


RANDOM = Criterion(
    name="random", words="chance", help="at random", score_groups=draw, forward_only=True
)
