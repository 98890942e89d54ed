"""The learning rate: several are tried for a tenth of the steps, each from the same pruned model.

Which rate is best depends on the model, the data and the steps, and no rule that we know foretells
it. So the model is pruned at once, and from there LoRA is trained anew with each rate, with the
warmup and the decay of the run, and judged by the loss of rows that were held out. Three trials are
usual: they go up from 1e-3 as long as the loss falls, or else down.

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

from lpdeploy.benchmark.trial import HELD_OUT_ROWS, simplify, use_training
from lpdeploy.config import PruneConfig
from lpdeploy.data.batches import TokenDataset
from lpdeploy.errors import NonFiniteError
from lpdeploy.pruning.guard import collect_held_out
from lpdeploy.pruning.ranks import Ranks
from lpdeploy.pruning.setup import Source
from lpdeploy.pruning.target import RateTrial
from lpdeploy.pruning.training import Training, count_steps, run_steps
from lpdeploy.pruning.walk import Calibration, measure_loss

logger = logging.getLogger(__name__)

RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
"""Learning rates to choose from."""
_FIRST = RATES.index(1e-3)
_ABOUT = 0.01  # of the loss
_SHARE = 0.1
_FEWEST_STEPS, _MOST_STEPS = 10, 100


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
        NonFiniteError: No rate has a finite loss.
    """
    steps = count_trial_steps(count_steps(options, len(dataset)))
    options = simplify(options, schedule="separate", steps=steps)

    def try_rates(training: Training) -> list[RateTrial]:
        next(iter(run_steps(training)))  # scores and removes
        held_out = collect_held_out(training, count=HELD_OUT_ROWS)
        initial = [parameter.detach().clone() for parameter in training.trainable]

        def measure(rate: float) -> float:
            _restart(training, initial)
            training.options = replace(options, lr=rate)
            loss = _train(training, held_out)
            if training.ranks.is_first:
                logger.info("`lr=%g`: loss %.3f on held-out rows after %s steps", rate, loss, steps)
            return loss

        return put_chosen_first(climb(measure))

    trials = use_training(source, dataset, options, try_rates, ranks=ranks)
    if not math.isfinite(trials[0].loss):
        raise NonFiniteError(
            "The loss of held-out rows is not finite with any learning rate. Check the model and "
            "the data, or use `dtype='fp32'`."
        )
    return trials


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


def _train(training: Training, held_out: Calibration) -> float:
    try:
        for _ in run_steps(training, start=0):
            pass
    except NonFiniteError:
        return math.inf
    loss = measure_loss(training.state.model, held_out)
    return loss if math.isfinite(loss) else math.inf
