"""Optimal Brain Surgeon on whole groups: what an output loses when the rest makes up for it."""

from typing import TYPE_CHECKING

from lpdeploy.criteria.record import Criterion

if TYPE_CHECKING:
    from torch import Tensor

_RIDGE = 1e-2
_ROUNDS = 32


def score_outputs(weight: "Tensor", gram: "Tensor", *, block: int) -> "Tensor":
    """Eliminate the groups one after the other, and score each by what its removal costs.

    With W the weight and G = X'X of its inputs X, and a small ridge on G, removing the columns S
    and solving the others again changes the output by

        L(S) = trace(W_S ([G^-1]_SS)^-1 W_S')

    in squared norm. The groups that cost least go first; W and G^-1 are then those of the columns
    that stay, so a group whose like is gone costs more. Groups go in 32 rounds, or one at a time
    where there are fewer.

    Args:
        weight: Shape (out, G * block).
        gram: Shape (G * block, G * block).
        block: Columns of a group.

    Returns:
        What each group cost when it went, shape (G,), float32, rising in the order in which they
        went.

    Source:
        Optimal Brain Surgeon (Hassibi and Stork, 1993) for single weights; ZipLM
        (arXiv:2302.04089), Eq. 4, and SlimGPT (arXiv:2412.18110) for groups of columns. Rounds are
        ours. Weighting by the Fisher information of the output changed little.
    """
    import torch

    groups = weight.shape[1] // block
    inverse = _invert(gram)
    weight = weight.to(torch.float64, copy=True)  # it changes below
    columns = torch.arange(groups * block, device=weight.device).view(groups, block)
    scores = torch.zeros(groups, dtype=torch.float64, device=weight.device)
    alive = torch.arange(groups, device=weight.device)
    largest = scores.new_zeros(())
    while len(alive):
        losses = _compute_losses(weight, inverse, columns[alive])
        going = losses.argsort()[: max(1, groups // _ROUNDS)]
        # Rising also where rounding, or a group that two others stand for, would have it fall.
        scores[alive[going]] = losses[going].clamp_min(largest).cummax(dim=0).values
        largest = scores[alive[going]].max() * (1 + 1e-6)
        _eliminate(weight, inverse, columns[alive[going]].flatten())
        stays = torch.ones(len(alive), dtype=torch.bool, device=alive.device)
        stays[going] = False
        alive = alive[stays]
    return scores.float()


def _invert(gram: "Tensor") -> "Tensor":
    import torch

    shifted = gram.to(torch.float64, copy=True)
    mean = shifted.diagonal().mean()
    # Without any input, all groups cost nothing.
    shifted.diagonal().add_(_RIDGE * mean if mean > 0 else 1.0)
    return torch.cholesky_inverse(torch.linalg.cholesky(shifted))


def _compute_losses(weight: "Tensor", inverse: "Tensor", columns: "Tensor") -> "Tensor":
    """Return L of each group by itself; ``columns`` has shape (groups, block)."""
    import torch

    own = inverse[columns.unsqueeze(2), columns.unsqueeze(1)]  # (groups, block, block)
    parts = weight[:, columns].permute(1, 0, 2)  # (groups, out, block)
    if columns.shape[1] == 1:
        return parts.square().sum(dim=(1, 2)) / own.flatten()
    return (torch.linalg.solve(own, parts.transpose(1, 2)) * parts.transpose(1, 2)).sum(dim=(1, 2))


def _eliminate(weight: "Tensor", inverse: "Tensor", columns: "Tensor") -> None:
    """Let the other columns make up for some, and take these out of the inverse, in place."""
    import torch

    share = torch.linalg.solve(inverse[columns][:, columns], inverse[columns])  # (gone, all)
    weight.addmm_(weight[:, columns], share, alpha=-1)
    inverse.addmm_(inverse[:, columns], share, alpha=-1)


OBS = Criterion(
    name="obs",
    words="what the outputs of the layers lose when the remaining weights make up for it",
    help="from what a layer's output loses after a refit (Optimal Brain Surgeon), group by group",
    score_outputs=score_outputs,
    forward_only=True,
)
