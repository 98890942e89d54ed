"""The learning rate: several are tried for a tenth of the steps, each from the same pruned model.

Which rate is best depends on the model, the data and the steps, and no rule that we know foretells
it. So the model is pruned at once, and from there LoRA is trained anew with each rate, with the
same warmup and decay as in the run, and judged by the loss of rows that were held out. Three trials
are usual: they go up from 1e-3 as long as the loss falls, or else down.

Few steps favour high rates: on our models, the best rate of a trial was up to three times that of
the whole run, but hardly better than the next lower one. So of the rates that are about as good as
the best, the lowest is taken.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lpdeploy.benchmark.trial import simplify, use_training
from lpdeploy.config import PruneConfig
from lpdeploy.data.batches import TokenDataset, list_batch
from lpdeploy.errors import LpdeployError, NonFiniteError
from lpdeploy.pruning.ranks import Ranks
from lpdeploy.pruning.setup import Source
from lpdeploy.pruning.target import RateTrial
from lpdeploy.pruning.training import Training, count_hold_steps, count_steps, run_steps
from lpdeploy.pruning.walk import (
    Calibration,
    collect_calibration,
    list_held_out,
    measure_loss,
)

logger = logging.getLogger(__name__)

RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
"""Learning rates to choose from."""
_FIRST = RATES.index(1e-3)
_ABOUT = 0.01  # of the loss
_SHARE = 0.1
_FEWEST_STEPS, _MOST_STEPS = 10, 100
_FEWEST_ROWS, _MOST_REFIT_ROWS = 8, 4096
_MOST_HOLD = 0.9  # of the steps


def choose_rate(
    source: Source, dataset: TokenDataset, options: PruneConfig, *, ranks: Ranks | None = None
) -> list[RateTrial]:
    """Try learning rates.

    Args:
        source: The base.
        dataset: Tokens.
        options: How to prune and to train.
        ranks: The processes that share each batch; None for this one alone.

    Returns:
        What was tried, the chosen one first.

    Raises:
        LpdeployError: There are too few rows.
        NonFiniteError: No rate has a finite loss.
        RunEndedError: A rank was told to stop.
    """
    total = count_steps(options, len(dataset))
    steps = count_trial_steps(total)
    hold = count_hold_steps(options, source.prunable, steps=total) / total
    options = simplify(options, schedule="separate", steps=steps, lr_hold=min(hold, _MOST_HOLD))
    rows, judges = split_held_out(dataset, options)

    def try_rates(training: Training) -> list[RateTrial]:
        next(iter(run_steps(training)))  # scores and removes
        held_out = collect_calibration(
            dataset,
            judges,
            micro_batch_size=options.micro_batch_size,
            autocast=training.autocast,
            ranks=training.ranks,
        )
        if training.ranks.is_first:
            logger.info("Trying learning rates, each for %s steps.", steps)
        initial = [parameter.detach().clone() for parameter in training.trainable]

        def measure(rate: float) -> float:
            _restart(training, initial)
            training.options = replace(options, lr=rate)
            loss = _train(training, held_out)
            if training.ranks.is_first:
                logger.info("`lr=%g`: loss %.3f on held-out rows after %s steps", rate, loss, steps)
            return loss

        trials = put_chosen_first(climb(measure))
        if training.ranks.is_first and any(trial.loss < trials[0].loss for trial in trials):
            logger.info("`lr=%g` is about as good as the best, and lower", trials[0].lr)
        return trials

    trials = use_training(source, rows, options, try_rates, ranks=ranks)
    if not math.isfinite(trials[0].loss):
        raise NonFiniteError(
            "The loss of held-out rows is not finite with any learning rate. Check the model and "
            "the data, or use `dtype='fp32'`."
        )
    if trials[0].lr in (RATES[0], RATES[-1]):
        logger.warning(
            "`lr=%g` is the last rate that is tried; more data or more steps tell rates apart.",
            trials[0].lr,
        )
    return trials


def split_held_out(dataset: TokenDataset, options: PruneConfig) -> tuple[TokenDataset, list[int]]:
    """Choose the rows of the trials, and others that judge them.

    Args:
        dataset: Tokens.
        options: Of a trial.

    Returns:
        The first rows of the first pass, as many as a trial may see, and which ones are held out.

    Raises:
        LpdeployError: There are too few rows.
    """
    if len(dataset) < _FEWEST_ROWS:
        raise LpdeployError(
            f"`lr='auto'` needs rows to train on and others to judge by, and there are "
            f"{len(dataset)}. Give a learning rate, or at least {_FEWEST_ROWS} rows of data."
        )
    held_out = list_held_out(dataset, seed=options.seed)
    assert options.steps is not None
    wanted = options.steps * options.batch_size + options.num_calibration_rows + _MOST_REFIT_ROWS
    rows = list_batch(len(dataset), step=0, batch_size=len(dataset), seed=options.seed)
    return dataset.select(rows[: len(rows) - len(held_out)][:wanted]), held_out


def count_trial_steps(steps: int) -> int:
    """Return how many steps a rate is tried for in a run of so many: a tenth, from 10 to 100."""
    return min(steps, max(_FEWEST_STEPS, min(_MOST_STEPS, round(_SHARE * steps))))


def climb(measure: Callable[[float], float]) -> list[RateTrial]:
    """Go through the rates in the direction in which the loss falls, until it rises.

    Args:
        measure: Returns the loss after training with a rate; infinity where it diverges.

    Returns:
        What was measured, in ascending order.
    """
    best, losses = _FIRST, {_FIRST: measure(RATES[_FIRST])}
    for way in (1, -1):
        while 0 <= best + way < len(RATES) and best + way not in losses:
            losses[best + way] = measure(RATES[best + way])
            diverged = way < 0 and losses[best] == math.inf  # a lower rate may do
            if losses[best + way] >= losses[best] and not diverged:
                break
            best += way
    return [RateTrial(RATES[place], losses[place]) for place in sorted(losses)]


def put_chosen_first(trials: Sequence[RateTrial]) -> list[RateTrial]:
    """Order trials so that the lowest rate of those that are about as good as the best leads."""
    enough = (1 + _ABOUT) * min(trial.loss for trial in trials)
    chosen = min((t for t in trials if t.loss <= enough), key=lambda t: t.lr)
    return [chosen, *(trial for trial in trials if trial is not chosen)]


def _restart(training: Training, initial: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for parameter, values in zip(training.trainable, initial, strict=True):
            parameter.copy_(values)
    training.optimizer.state.clear()
    training.optimizer.zero_grad()  # of a trial that diverged


def _train(training: Training, held_out: Calibration) -> float:
    try:
        for _ in run_steps(training, start=0):
            training.ranks.check_stop()
    except NonFiniteError:
        return math.inf
    loss = measure_loss(training.state.model, held_out)
    return loss if math.isfinite(loss) else math.inf
