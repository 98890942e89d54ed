"""A criterion of one's own: one record, and the rest of the line knows it.

python examples/new_criterion.py MODEL TRAIN_TEXT OUTPUT
"""

import sys

import torch

import lpdeploy
from lpdeploy.criteria import CRITERIA, Criterion, ScoredLinear, ScoreRows


def score_relative(_: ScoredLinear) -> ScoreRows:
    """Score a weight by its share of the largest weight in its row."""

    def score(rows: slice, weights: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
        return weights / weights.abs().amax(dim=1, keepdim=True).clamp_min(1e-12)

    return score


CRITERIA["relative"] = Criterion(
    name="relative",
    words="the size of the weights in their rows",
    help="the size of a weight divided by the largest in its row",
    score_weights=score_relative,
)


def main(model: str, train: str, output: str) -> None:
    """Prune by the new criterion, without training."""
    config = lpdeploy.PruneConfig(
        ratio=0.25, criterion="relative", schedule="one-shot", calibration_samples=4, seq_len=64,
        batch_size=4,
    )  # fmt: skip
    run = lpdeploy.prune(model, data=train, output=output, config=config)
    run.compact()
    print(run.load_plan().achieved)


if __name__ == "__main__":
    main(*sys.argv[1:])
