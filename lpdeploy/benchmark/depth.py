"""Which shape to prune to: several are tried, all with as many parameters or as fast as asked.

Each trial is a whole one-shot pruning of a fresh model with the options of the run, and the one
after which rows that were held out have the lowest loss is taken. What a layer or a group is worth
by itself would not tell: the two are scored differently, and a refit makes up for more of one than
of the other. A trial costs as much as a few steps of training.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from transformers import PretrainedConfig

from lpdeploy.benchmark.trial import HELD_OUT_ROWS, simplify, use_training
from lpdeploy.benchmark.trial_cache import TrialCache
from lpdeploy.config import PruneConfig
from lpdeploy.data.batches import TokenDataset
from lpdeploy.errors import NonFiniteError
from lpdeploy.families.groups import list_layer_specs
from lpdeploy.models.shapes import count_kept
from lpdeploy.plan import name_groups
from lpdeploy.pruning.guard import collect_held_out
from lpdeploy.pruning.setup import Source
from lpdeploy.pruning.target import DepthTrial, TargetRecord
from lpdeploy.pruning.training import Training, run_steps
from lpdeploy.pruning.walk import measure_loss

logger = logging.getLogger(__name__)

_MOST = 4
# What changes nothing where nothing is trained.
_UNTRAINED = {"steps": 1, "epochs": 1, "lr_warmup": 0.0, "lr_hold": None, "max_grad_norm": 1.0}


def spread(depths: Sequence[int]) -> list[int]:
    """Return at most four of some ascending numbers, evenly spaced, with the first and the last."""
    if len(depths) <= _MOST:
        return list(depths)
    last = len(depths) - 1
    return [depths[round(place * last / (_MOST - 1))] for place in range(_MOST)]


def choose_depth(
    source: Source,
    dataset: TokenDataset,
    options: PruneConfig,
    candidates: Sequence[TargetRecord],
    *,
    cache: TrialCache,
) -> TargetRecord:
    """Choose the candidate that loses least.

    Args:
        source: The base.
        dataset: Tokens.
        options: How to prune.
        candidates: Shapes that meet the target: a number of dropped layers, and ratios.
        cache: The losses of earlier trials.

    Returns:
        The record of the best one, with all that were tried.

    Raises:
        NonFiniteError: No candidate has a loss.
    """
    tried: list[tuple[float, TargetRecord]] = []
    logger.info("Trying %s shapes, each with a one-shot pruning of its own.", len(candidates))
    for number, record in enumerate(candidates, start=1):
        trial = options.with_ratios(**record.ratios)
        alone = simplify(trial, schedule="one-shot", **_UNTRAINED)
        loss = cache.measure(alone, partial(_try, source, dataset, alone))
        shape = _describe(source.config, trial)
        logger.info(
            "%s of %s: %s; loss %.3f on held-out rows, without fine-tuning",
            number, len(candidates), shape, loss,
        )  # fmt: skip
        if math.isfinite(loss):
            tried.append((loss, record))
    if not tried:
        raise NonFiniteError(
            "The loss of held-out rows is not finite with any of the shapes. Check the "
            "model and the data, or use `dtype='fp32'`."
        )
    _, best = min(tried, key=lambda pair: pair[0])
    return replace(best, trials=tuple(DepthTrial(record.ratios, loss) for loss, record in tried))


def _describe(config: PretrainedConfig, options: PruneConfig) -> str:
    request, layers = options.widths, config.num_hidden_layers
    kept = count_kept(config, request)
    widths = " and ".join(
        f"{kept[spec.kind]:,} of {spec.num_groups:,} {name_groups(spec)}"
        for spec in list_layer_specs(config, 0, heads=request.heads)
    )
    protected = " that is not protected" if options.protect_first + options.protect_last else ""
    return f"{layers - request.drop_layers} of {layers} layers, each{protected} with {widths}"


def _try(source: Source, dataset: TokenDataset, options: PruneConfig) -> float:
    """Prune a fresh model at once, and return its loss on rows that had no part in it."""

    def measure(training: Training) -> float:
        for _ in run_steps(training):
            pass
        held_out = collect_held_out(training, count=HELD_OUT_ROWS)
        return measure_loss(training.state.model, held_out)

    return use_training(source, dataset, options, measure)
