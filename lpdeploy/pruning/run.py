"""The prune stage: from a model and a data source to a run folder."""

import json
import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lpdeploy.artifacts import atomic_file, save_json
from lpdeploy.config import PruneConfig
from lpdeploy.data.batches import Progress, TokenDataset
from lpdeploy.data.sources import name_source
from lpdeploy.errors import (
    LpdeployError,
    NonFiniteError,
    OtherRankError,
    RankLostError,
    RunEndedError,
)
from lpdeploy.manifest import Stage, record_stage
from lpdeploy.models.chat_format import ChatFormat
from lpdeploy.models.loading import (
    compute_model_sha256,
)
from lpdeploy.models.quantized import check_load_in
from lpdeploy.plan import PruningPlan
from lpdeploy.pruning.checkpoint import (
    Checkpoint,
    check_resumable,
    explain_unfinished,
    load_checkpoint,
    save_checkpoint,
)
from lpdeploy.pruning.distillation import prepare_teacher
from lpdeploy.pruning.fit import check_memory
from lpdeploy.pruning.guard import EventLoss, LossIncreaseError
from lpdeploy.pruning.log import StepInfo, append_log, load_log, load_losses, trim_log
from lpdeploy.pruning.ranks import OTHER_START, Ranks, join_ranks
from lpdeploy.pruning.results import build_plan, complete_run, save_results
from lpdeploy.pruning.setup import (
    Source,
    build_training,
    check_refit_data,
    describe_start,
    find_chat_format,
    load_dataset,
    load_source,
)
from lpdeploy.pruning.target import TargetRecord
from lpdeploy.pruning.training import Training, run_steps
from lpdeploy.run_folder import RunFolder

logger = logging.getLogger(__name__)

_LOSS_WINDOW = 10


@dataclass(frozen=True)
class PruneResult:
    """What ``prune`` did, as its JSON says it.

    Attributes:
        run: The folder it wrote.
        ratio: Share of groups asked to be removed.
        achieved: Share removed, of groups, heads, channels, layers and parameters.
        steps: Optimizer steps.
        seconds: Of the whole stage.
        peak_bytes: Peak memory of the device or the process.
        loss: Mean of the last steps' losses, in nats a token; of one-shot, before the removal.
        last_event: Loss of held-out rows around the last removal; None on other ranks, and where
            nothing was removed.
    """

    run: str
    ratio: float
    achieved: Mapping[str, float]
    steps: int
    seconds: float
    peak_bytes: int
    loss: float
    last_event: EventLoss | None = None


def prune(  # noqa: PLR0913 - what the command takes, and callbacks
    model: str,
    output: Path,
    *,
    data: Any,
    options: PruneConfig,
    target: TargetRecord | None = None,
    cache: bool = True,
    resume: bool = False,
    overwrite: bool = False,
    stop: threading.Event | None = None,
    on_tokenize: Progress | None = None,
    on_distill: Progress | None = None,
    on_start: Callable[[], None] = lambda: None,
    on_step: Callable[[StepInfo], None] = lambda _: None,
) -> PruneResult:
    """Prune a model while it fine-tunes with LoRA (Algorithm 1), and write a run folder.

    Where a launcher has started several processes, all call this; the first one writes.

    Args:
        model: Hugging Face folder or hub name.
        output: The run folder: plan.json, adapter/, importance.safetensors, log.jsonl,
            manifest.json, recipe.yaml, and checkpoint/ while running.
        data: File, folder or hub name, or rows such as a ``datasets.Dataset``.
        options: How to prune.
        target: How a budget was turned into these ratios, for target.json; None if none was given.
        cache: Keep the tokens of ``data`` for later runs, and use those of an earlier one.
        resume: Go on from the checkpoint in ``output``.
        overwrite: Replace a run that is already there.
        stop: Set it, from another thread or a signal handler, to end the run after the current
            step, with a checkpoint. The library itself handles no signals.
        on_tokenize: Is told (examples tokenized, all examples).
        on_distill: Is told (rows done, all rows) while the unpruned model runs for ``distill``.
        on_start: Called by every rank before the first step, once nothing stands against the run.
        on_step: Called after every optimizer step.

    Raises:
        LpdeployError: Model, data or output cannot be used, memory will not suffice, a loss is
            not finite, or another rank is gone.
        RunEndedError: ``stop`` was set.
        OtherRankError: Another rank reports the same error.
    """
    options.check_resolved()  # before anything is read
    check_load_in(options.load_in)
    run, ranks = RunFolder(output), join_ranks(options, stop=stop)
    source = load_source(model, options)
    record = {"model": model, "data": name_source(data), **options.to_json()}
    recorded = record if target is None else {**record, "target": target.to_json()}
    with (
        _claim(run, ranks, base=source.folder, resume=resume, overwrite=overwrite),
        explain_unfinished(run),
    ):
        memory = check_memory(source.config, options, refuse=not resume, ranks=ranks.size)
        recording = record_stage(run.path, "prune", recorded)
        with recording if ranks.is_first else nullcontext(Stage()) as stage:
            stage.planned = memory.to_json()
            dataset = load_dataset(source, data, options, cache=cache, on_progress=on_tokenize)
            check_refit_data(source, dataset, options)
            stage.inputs = {
                "base": compute_model_sha256(source.folder),
                "data": dataset.sha256,
            }
            checkpoint = _load_checkpoint(run, record, options, stage) if resume else None
            given = (source, dataset, options)
            teacher = prepare_teacher(
                *given, ranks, base_sha256=stage.inputs["base"], on_progress=on_distill
            )
            training = build_training(*given, checkpoint, ranks, teacher=teacher)
            _check_same_start(ranks, options, stage, checkpoint)
            if ranks.is_first:
                logger.info(describe_start(source, training))
                if checkpoint is not None:
                    logger.info("going on after step %s of %s", checkpoint.step, training.steps)
            on_start()
            if ranks.is_first:
                _prepare_output(run, source, dataset, record, checkpoint, target)
            losses, last_good = _run(run, training, checkpoint, stage=stage, on_step=on_step)
            if last_good is not None:
                del training  # there may be no room for two
                training = build_training(*given, last_good, ranks)
            plan = build_plan(training.state, options, source.config, base=source.base, stage=stage)
            if ranks.is_first:
                plan = save_results(run, training.model, training.state, plan=plan, stage=stage)
        if ranks.is_first:
            complete_run(run, plan)
    steps = training.steps if last_good is None else last_good.step
    return _build_result(run, plan, stage, steps=steps, losses=losses, is_first=ranks.is_first)


def _build_result(
    run: RunFolder,
    plan: PruningPlan,
    stage: Stage,
    *,
    steps: int,
    losses: list[float],
    is_first: bool,
) -> PruneResult:
    return PruneResult(
        run=str(run),
        ratio=plan.ratio,
        achieved=plan.achieved,
        steps=steps,
        seconds=stage.seconds,
        peak_bytes=stage.peak_bytes,
        loss=sum(losses) / len(losses) if losses else math.nan,
        last_event=_find_last_event(run) if is_first else None,
    )


def _find_last_event(run: RunFolder) -> EventLoss | None:
    for info in reversed(load_log(run)):
        if info.removed and info.loss_before is not None and info.loss_after is not None:
            return EventLoss(info.loss_before, info.loss_after)
    return None


def _check_same_start(
    ranks: Ranks, options: PruneConfig, stage: Stage, checkpoint: Checkpoint | None
) -> None:
    """Refuse to begin where ranks would not do the same."""
    step = None if checkpoint is None else checkpoint.step
    ranks.check_same(
        json.dumps([options.to_json(), stage.inputs, step]),
        otherwise=OTHER_START,
    )


@contextmanager
def _claim(
    run: RunFolder, ranks: Ranks, *, base: Path, resume: bool, overwrite: bool
) -> Iterator[None]:
    """Hold the run folder on the rank that writes, and refuse one that cannot be used."""
    if not ranks.is_first:
        yield
        return
    with run.hold():
        run.check_free(base=base, resume=resume, overwrite=overwrite)
        if resume:
            check_resumable(run)
        yield


def _load_checkpoint(
    run: RunFolder,
    record: Mapping[str, Any],
    options: PruneConfig,
    stage: Stage,
) -> Checkpoint:
    names = {"base": record["model"], "data": record["data"]}
    return load_checkpoint(run, options=options, inputs=stage.inputs, names=names)


def _prepare_output(
    run: RunFolder,
    source: Source,
    dataset: TokenDataset,
    record: Mapping[str, Any],
    checkpoint: Checkpoint | None,
    target: TargetRecord | None,
) -> None:
    """Leave in a run only what it begins or goes on with; called when all input is known good."""
    run.claim(clear=checkpoint is None, base=source.folder)
    with run.recorded(run.recipe, run.target):
        with atomic_file(run.recipe) as temporary:
            temporary.write_text(yaml.safe_dump({"prune": dict(record)}, sort_keys=False))
        if target is not None:
            save_json(run.target, target.to_json())
    if checkpoint is not None:
        trim_log(run, checkpoint.step, sha256=checkpoint.log_sha256)
    _save_chat_format(run, find_chat_format(source, dataset))


def _save_chat_format(run: RunFolder, form: ChatFormat | None) -> None:
    """Keep how conversations are written, for all that is made of the run."""
    with run.recorded(run.chat):
        if form is None:
            run.chat.unlink(missing_ok=True)
        else:
            form.save(run.chat)


def _run(
    run: RunFolder,
    training: Training,
    checkpoint: Checkpoint | None,
    *,
    stage: Stage,
    on_step: Callable[[StepInfo], None],
) -> tuple[list[float], Checkpoint | None]:
    """Run the steps, log each, save checkpoints.

    Returns:
        The last losses, and the state to end with if not the present one.
    """
    last_good = None
    done = None if checkpoint is None else checkpoint.step
    losses = [] if done is None else load_losses(run, done)
    options, ranks = training.options, training.ranks
    try:
        for info in run_steps(training, start=done):
            done = info.step
            # A calibration's loss is that of the unpruned model: it counts where nothing follows.
            losses = [*(losses if done > 1 else []), info.loss]
            if ranks.is_first:
                append_log(run, info)
                on_step(info)
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
