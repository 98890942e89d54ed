"""What the trials that choose a depth, a rate or widths have in common: a training of their own."""

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch

from lpdeploy.config import PruneConfig
from lpdeploy.data.batches import TokenDataset
from lpdeploy.pruning.ranks import Ranks
from lpdeploy.pruning.setup import Source, build_training
from lpdeploy.pruning.training import Training

HELD_OUT_ROWS = 64
"""Rows that judge a trial, none of which has a part in it."""
_ANY_RATE = 1e-4  # where nothing is trained, or the trial sets its own
_Found = TypeVar("_Found")


def simplify(options: PruneConfig, **changes: Any) -> PruneConfig:
    """Return the options of a run as a short trial has them, with changes of its own."""
    plain: dict[str, Any] = {
        "calibration_samples": options.num_calibration_rows or None,
        "lr": _ANY_RATE,
        "distill": None,
        "distill_temperature": None,
        "distill_top_k": None,
        "distill_live": False,
        "compile": False,
        "max_loss_increase": None,
        "checkpoint_every": 0,
    }
    return replace(options, **{**plain, **changes})


def use_training(
    source: Source,
    dataset: TokenDataset,
    options: PruneConfig,
    use: Callable[[Training], _Found],
    *,
    ranks: Ranks | None = None,
) -> _Found:
    """Return what ``use`` finds out from a training of its own, whose memory is free afterwards."""
    with _quiet():
        training = build_training(source, dataset, options, None, ranks)
        found = use(training)
    del training
    gc.collect()
    if torch.cuda.is_available():  # another process may want the GPU
        torch.cuda.empty_cache()
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what a training says of its parts from the user, who did not start it."""
    logger = logging.getLogger("lpdeploy.pruning")
    level = logger.level
    logger.setLevel(max(logging.WARNING, logger.getEffectiveLevel()))
    try:
        yield
    finally:
        logger.setLevel(level)
