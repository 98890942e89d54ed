"""The prune stage: from a model and a data source to a run folder."""

import json
import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from lpdeploy.artifacts import atomic_file, save_json
from lpdeploy.config import PruneConfig
from lpdeploy.data.batches import Progress, TokenDataset
from lpdeploy.data.sources import name_source
from lpdeploy.errors import RecipeError
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
)
from lpdeploy.pruning.distillation import prepare_teacher
from lpdeploy.pruning.fit import check_memory
from lpdeploy.pruning.guard import EventLoss
from lpdeploy.pruning.inputs import check_beside
from lpdeploy.pruning.log import StepInfo, load_log, trim_log
from lpdeploy.pruning.loop import run_training
from lpdeploy.pruning.monitor import build_monitor
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
from lpdeploy.pruning.tracking import open_trackers
from lpdeploy.pruning.training import Training
from lpdeploy.recipe import load_sections
from lpdeploy.run_folder import RunFolder

logger = logging.getLogger(__name__)


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
    valid: Any = None,
    options: PruneConfig,
    target: TargetRecord | None = None,
    report_to: Sequence[str] = (),
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
        valid: Likewise, text that is not trained on, to measure the loss on; None for none.
        options: How to prune.
        target: How a budget was turned into these ratios, for target.json; None if none was given.
        report_to: Experiment trackers that are told of each step; see ``TRACKERS``.
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
    check_beside(options, valid=valid, report_to=report_to)
    check_load_in(options.load_in)
    run, ranks = RunFolder(output), join_ranks(options, stop=stop)
    source = load_source(model, options)
    record = _describe_run(model, data, valid, options)
    recorded = record if target is None else {**record, "target": target.to_json()}
    with (
        _claim(run, ranks, base=source.folder, resume=resume, overwrite=overwrite),
        explain_unfinished(run),
    ):
        memory = check_memory(source.config, options, refuse=not resume, ranks=ranks.size)
        recording = record_stage(run.path, "prune", recorded)
        with recording if ranks.is_first else nullcontext(Stage()) as stage:
            stage.planned = memory.to_json()
            load = partial(load_dataset, source, cache=cache, on_progress=on_tokenize)
            dataset = load(data, options)
            held_out = None if valid is None else load(valid, options, split="test")
            check_refit_data(source, dataset, options)
            base = compute_model_sha256(source.folder)
            stage.inputs = {"base": base, "data": dataset.sha256}
            checkpoint = _load_checkpoint(run, record, options, stage) if resume else None
            given = (source, dataset, options)
            teacher = prepare_teacher(*given, ranks, base_sha256=base, on_progress=on_distill)
            training = build_training(*given, checkpoint, ranks, teacher=teacher)
            _check_same_start(ranks, options, stage, checkpoint)
            _log_start(source, training, checkpoint)
            on_start()
            if ranks.is_first:
                _prepare_output(run, source, dataset, record, checkpoint, target)
            complete = build_monitor(source, training, held_out)
            with _open_trackers(report_to, run, record, checkpoint, ranks) as track:
                losses, last_good = run_training(
                    *(run, training, checkpoint, complete, (track, on_step)), stage=stage
                )
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


def _describe_run(model: str, data: Any, valid: Any, options: PruneConfig) -> dict[str, Any]:
    own = {} if valid is None else {"valid": name_source(valid)}
    return {"model": model, "data": name_source(data), **own, **options.to_json()}


def _open_trackers(
    names: Sequence[str],
    run: RunFolder,
    record: Mapping[str, Any],
    checkpoint: Checkpoint | None,
    ranks: Ranks,
) -> AbstractContextManager[Callable[[StepInfo], None]]:
    first = 0 if checkpoint is None else checkpoint.step + 1
    return open_trackers(names if ranks.is_first else (), run, record, first=first)


def _log_start(source: Source, training: Training, checkpoint: Checkpoint | None) -> None:
    if training.ranks.is_first:
        logger.info(describe_start(source, training))
        if training.options.max_loss_increase is not None and not training.schedule.list_events():
            logger.warning(
                "`max_loss_increase` has no effect: it is checked when groups are removed, and "
                "only whole layers go."
            )
        if checkpoint is not None:
            logger.info("going on after step %s of %s", checkpoint.step, training.steps)


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
    with suppress(RecipeError, KeyError):  # a recipe that was lost says nothing
        before = load_sections(run.recipe)["prune"].get("valid")
        if before and record.get("valid") not in (None, before):
            logger.warning(
                "`valid` was '%s' when the run began, and is '%s' now: earlier losses are "
                "of the former text.",
                *(before, record["valid"]),
            )
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
