"""Ridge least squares from sums over tokens, with a ridge that is chosen on tokens held out."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lpdeploy.errors import LpdeployError
from lpdeploy.pruning.gram import add_gram

RIDGES = (1e-2, 1e-3, 1e-1)
"""Ridges to choose from, the first of those that are equally good."""
_GROWTH = 10.0
_LARGEST_RIDGE = 1e6


@dataclass
class Sums:
    """What the solution of one weight needs of its calibration tokens.

    Attributes:
        gram: X'X, shape (kept, kept), float32.
        cross: X'R, shape (kept, hidden), float32.
    """

    gram: Tensor
    cross: Tensor

    def add(self, inputs: Tensor, missing: Tensor) -> None:
        """Add tokens: inputs (tokens, kept) and what is missing behind them (tokens, hidden)."""
        add_gram(self.gram, inputs)
        self.cross.addmm_(inputs.T, missing)

    def compute_loss(self, change: Tensor) -> float:
        """Return ``||X D - R||^2 - ||R||^2`` for a change D, shape (kept, hidden)."""
        return float(((self.gram @ change - 2 * self.cross) * change).sum())

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(self.gram + other.gram, self.cross + other.cross)


def solve_ridge(sums: Sums, ridge: float) -> Tensor:
    """Solve ridge least squares by Cholesky; the ridge grows until that succeeds.

    Args:
        sums: Over the calibration tokens.
        ridge: As a share of the mean of the Gram matrix's diagonal.

    Returns:
        The change D, shape (kept, hidden); zeros where all inputs are.

    Raises:
        LpdeployError: No ridge helps: the inputs are not finite.
    """
    mean = sums.gram.diagonal().mean()
    if mean == 0:
        return torch.zeros_like(sums.cross)
    while ridge < _LARGEST_RIDGE:
        shifted = sums.gram.clone()
        shifted.diagonal().add_(ridge * mean)
        factor, info = torch.linalg.cholesky_ex(shifted)
        if info == 0 and factor.isfinite().all():
            return torch.cholesky_solve(sums.cross, factor)
        ridge *= _GROWTH
    raise LpdeployError(
        "The inputs of a weight that is to be refitted are not finite. Check the model and the "
        "data, or use `dtype='fp32'`."
    )


def solve(fitted: Sums, held_out: Sums) -> tuple[Tensor, float | None]:
    """Solve with the ridge that is best on tokens that were held out, then over all tokens.

    Returns:
        The change D, shape (kept, hidden), and the ridge; zeros and None where every ridge would
        do harm.
    """
    losses = {ridge: held_out.compute_loss(solve_ridge(fitted, ridge)) for ridge in RIDGES}
    best = min(losses, key=lambda ridge: losses[ridge])
    if losses[best] > 0:
        return torch.zeros_like(fitted.cross), None
    return solve_ridge(fitted + held_out, best), best


def make_sums(weight: Tensor) -> Sums:
    """Return sums over no tokens for a weight of shape (hidden, kept), on its device."""
    hidden, kept = weight.shape
    make = partial(torch.zeros, device=weight.device, dtype=torch.float32)
    return Sums(make(kept, kept), make(kept, hidden))
