"""The steps of a run, and what is kept of it when they break off."""

import logging
from collections.abc import Callable, Iterable

from lpdeploy.config import PruneConfig
from lpdeploy.errors import (
    LpdeployError,
    NonFiniteError,
    OtherRankError,
    RankLostError,
    RunEndedError,
)
from lpdeploy.manifest import Stage
from lpdeploy.pruning.checkpoint import Checkpoint, save_checkpoint
from lpdeploy.pruning.guard import LossIncreaseError
from lpdeploy.pruning.log import StepInfo, append_log, load_losses
from lpdeploy.pruning.training import Training, run_steps
from lpdeploy.run_folder import RunFolder

logger = logging.getLogger(__name__)

_LOSS_WINDOW = 10


def run_training(
    run: RunFolder,
    training: Training,
    checkpoint: Checkpoint | None,
    complete: Callable[[StepInfo], StepInfo],
    told: Iterable[Callable[[StepInfo], None]],
    *,
    stage: Stage,
) -> tuple[list[float], Checkpoint | None]:
    """Run the steps of a run, log each, tell those who asked, and save checkpoints.

    Args:
        run: Where to.
        training: At the step after that of ``checkpoint``, or at the first.
        checkpoint: Where the run goes on from; None for a new run.
        complete: Adds to what a step did how the model stands after it; called by every rank.
        told: Called with it by the first rank.
        stage: Has the hashes of what goes in.

    Returns:
        The last losses, and the state to end with if not the present one.
    """
    last_good = None
    done = None if checkpoint is None else checkpoint.step
    losses = [] if done is None else load_losses(run, done)
    options, ranks = training.options, training.ranks
    try:
        for info in map(complete, run_steps(training, start=done)):
            done = info.step
            # A calibration's loss is that of the unpruned model: it counts where nothing follows.
            losses = [*(losses if done > 1 else []), info.loss]
            if ranks.is_first:
                append_log(run, info)
                for tell in told:
                    tell(info)
            if training.refused is not None:
                last_good = _accept_last_good(training.refused, training)
                break
            if info.removed:
                _check_same_groups(training, done)
            if ranks.is_first and _is_checkpoint_due(options, training, done):
                _save_checkpoint(run, training, done, stage)
            if done < training.steps:  # else nothing is left to break off
                ranks.check_stop()
    except (NonFiniteError, RankLostError, RunEndedError) as error:
        raise _break_off(error, run, training, done, stage) from error
    return losses[-_LOSS_WINDOW:], last_good


def _accept_last_good(error: LossIncreaseError, training: Training) -> Checkpoint:
    """Return the state before an event that cost too much, unless it is the unpruned model."""
    kept, step = error.last_good.select("kept"), error.last_good.step
    specs = training.state.specs
    untouched = all(len(kept[spec.name]) == spec.num_groups for spec in specs)
    if untouched and not training.options.drop_layers:
        how = "Allow more, or remove less"
        if training.options.schedule == "joint":
            how += ", or remove less at a time with a smaller `prune_every`"
        raise LpdeployError(
            f"{error} It was the first event, so there is no pruned model to end with. {how}."
        )
    if training.ranks.is_first:
        logger.warning(
            "%s The run ends with the groups that were left before it, after step %s of %s.",
            error,
            step,
            training.steps,
        )
    return error.last_good


def _check_same_groups(training: Training, step: int) -> None:
    """Refuse to go on where ranks have removed different groups."""
    if training.ranks.size > 1:
        training.ranks.check_same(
            str(training.state.list_kept(training.state.specs)),
            otherwise=f"it removed other groups at step {step}. Check the memory of its machine, "
            "and go on from the last checkpoint with `resume=True`.",
        )


def _is_checkpoint_due(options: PruneConfig, training: Training, done: int) -> bool:
    every = options.checkpoint_every
    return bool(every) and done % every == 0 and done < training.steps


def _break_off(
    error: LpdeployError, run: RunFolder, training: Training, done: int | None, stage: Stage
) -> LpdeployError:
    """Keep what the last whole step left, and return an error that says so and how to go on."""
    ranks, lost = training.ranks, isinstance(error, RankLostError)
    if not (ranks.is_first_to_notice() if lost else ranks.is_first):
        return OtherRankError(str(error))  # which meets the same, writes and speaks
    if done is None:
        hint = "start anew" if lost else "check the model and the data, or use `dtype='fp32'`"
        return type(error)(f"{error} No step was done: {hint}.")
    _save_checkpoint(run, training, done, stage)
    match error:
        case NonFiniteError():
            how = f"Lower `lr` (it was {training.options.peak_lr:g}) and go on with `resume=True`."
        case RankLostError():
            how = "Go on with `resume=True`, with as many ranks as you like."
        case _:
            how = RunEndedError.HINT
    return type(error)(f"{error} The state after step {done} is kept in '{run.checkpoint}'. {how}")


def _save_checkpoint(run: RunFolder, training: Training, step: int, stage: Stage) -> None:
    save_checkpoint(
        run, step=step, training=training, options=training.options, inputs=stage.inputs
    )
