"""Compare the scores of groups by LoRA's gradients with those by the true gradients.

    python -m tools.measure.lora_init MODEL --train train.txt --output docs/measurements/NAME.json
        [-- PRUNE_OPTIONS as NAME=VALUE ...]

Both are computed before the first step, where the groups of a run are first scored, for each way to
start LoRA. Each projection is compared on its own, and so are whole groups.
"""

import statistics
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lpdeploy.config import PruneConfig
from lpdeploy.criteria import CRITERIA, ScoredLinear
from lpdeploy.families.groups import FFN_LINEARS, LINEARS
from lpdeploy.models.adapters import get_base_linear, get_lora_weights
from lpdeploy.plan import LORA_INITS
from lpdeploy.pruning.importance import score_linear
from lpdeploy.pruning.setup import build_training, load_dataset, load_source
from lpdeploy.pruning.training import Training
from tools.measure.common import report, save_measurement
from tools.measure.turns import parse_study

ROWS = 128
CRITERIA_COMPARED = ("lora", "gradient")
OPTIONS: dict[str, Any] = {
    "batch_size": 8, "micro_batch_size": 8, "seq_len": 256, "lora_dropout": 0.0, "steps": 1,
    "checkpoint_every": 0,
}  # fmt: skip

Scores = dict[str, dict[str, Tensor]]
"""Criterion -> module, or spec for whole groups -> score of its groups, shape (G,)."""


def score_groups(training: Training) -> Scores:
    """Score each projection by both criteria, and add up those of a group."""
    options, model = training.options, training.state.model  # the causal LM inside peft
    pieces = [(spec.name, piece) for spec in training.state.specs for piece in spec.slices]
    weights = {p.module: get_base_linear(model.get_submodule(p.module)).weight for _, p in pieces}
    for weight in weights.values():
        weight.requires_grad = True
    scores: Scores = {name: defaultdict(lambda: torch.zeros(())) for name in CRITERIA_COMPARED}
    for start in range(0, ROWS, options.batch_size):
        model.zero_grad()
        batch = training.dataset.collate(range(start, start + options.batch_size))
        with training.autocast():
            model(**batch).loss.backward()
        for spec, piece in pieces:
            weight = weights[piece.module]
            lora = get_lora_weights(model.get_submodule(piece.module))
            linear = ScoredLinear(**vars(lora), observed=weight.grad)
            for name in CRITERIA_COMPARED:
                part = score_linear(
                    CRITERIA[name], weight.detach(), linear, dim=piece.dim, block=piece.block
                )
                scores[name][piece.module] = scores[name][piece.module] + part
                scores[name][spec] = scores[name][spec] + part
        report(start + options.batch_size, ROWS)
    return scores


def compute_rank_correlation(first: Tensor, second: Tensor) -> float:
    """Return Spearman's coefficient of two scores, shape (G,) each."""
    ranks = torch.stack([score.argsort().argsort().double() for score in (first, second)])
    return float(torch.corrcoef(ranks)[0, 1])


def compute_share(scores: dict[str, Tensor], kind: str, spec_kind: str) -> float:
    """Return the part of the score of whole groups that one projection gives, over the layers."""
    whole = [float(s.sum()) for name, s in scores.items() if name.endswith(f".{spec_kind}")]
    parts = [float(s.sum()) for name, s in scores.items() if name.endswith(f".{kind}")]
    return statistics.mean(part / all_ for part, all_ in zip(parts, whole, strict=True))


def compare(scores: Scores) -> dict[str, dict[str, float]]:
    """Compare both criteria, by the last part of the name: means over the layers.

    Returns:
        Name -> ``rank_correlation``; ``same_lowest``, the share of the layers in which both give
        the lowest score to the same group; and of projections ``share_lora`` and
        ``share_gradient``, their part of the scores of whole groups.
    """
    lora, gradient = (scores[name] for name in CRITERIA_COMPARED)
    kinds: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for name, score in lora.items():
        kinds[name.rsplit(".", 1)[1]].append((score, gradient[name]))
    return {
        kind: {
            "rank_correlation": statistics.mean(compute_rank_correlation(*pair) for pair in pairs),
            "same_lowest": statistics.mean(float(a.argmin() == b.argmin()) for a, b in pairs),
            **{
                f"share_{name}": compute_share(
                    scores[name], kind, "channels" if kind in FFN_LINEARS else "heads"
                )
                for name in CRITERIA_COMPARED
                if kind in LINEARS
            },
        }
        for kind, pairs in kinds.items()
    }


def main() -> None:
    """Read the command line, measure, and write the JSON."""
    given, own = parse_study(__doc__)
    options = PruneConfig(**{**OPTIONS, **own})
    source = load_source(given.model, options)
    dataset = load_dataset(source, given.train, options)
    starts = {
        init: compare(
            score_groups(build_training(source, dataset, replace(options, lora_init=init), None))
        )
        for init in LORA_INITS
    }
    save_measurement(
        given.output,
        {"model": Path(given.model).name, "options": {**OPTIONS, **own}, "rows": ROWS}
        | {"rank": options.lora_rank, "starts": starts},
    )


if __name__ == "__main__":
    main()
