"""The eval stage: perplexity and tasks, of a model, or of a run's model and its base."""

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from lpdeploy.artifacts import save_json
from lpdeploy.data.sources import load_corpus
from lpdeploy.engines import get_engine
from lpdeploy.engines.exports import load_place
from lpdeploy.engines.runner import Runner
from lpdeploy.engines.torch.runner import load_torch_runner
from lpdeploy.errors import MissingDependencyError
from lpdeploy.evaluation.options import EvalOptions
from lpdeploy.evaluation.perplexity import compute_perplexity
from lpdeploy.evaluation.results import Evaluation, Figures, load_evaluation
from lpdeploy.models.compact import find_base
from lpdeploy.models.generation import list_stop_tokens
from lpdeploy.models.loading import (
    load_config,
    load_tokenizer,
    resolve_device,
)
from lpdeploy.models.place import ModelPlace, check_has_base, locate_model
from lpdeploy.run_folder import RunFolder

TASKS = "tasks"
"""What ``on_progress`` is told as the source while tasks are run."""
Progress = Callable[[str, int, int], None]

logger = logging.getLogger(__name__)


def evaluate(
    model: str | os.PathLike[str],
    options: EvalOptions,
    *,
    engine: str = "torch",
    with_base: bool = False,
    base: Path | None = None,
    device: str = "auto",
    on_progress: Progress = lambda *_: None,
) -> Evaluation:
    """Measure perplexity on texts, and accuracy on tasks.

    For a run, the result is also merged into its ``eval.json``; see ``Evaluation.merge``. Figures
    of another model are dropped from there.

    Args:
        model: Model folder, hub name, or a run, whose compacted model is taken.
        options: What to measure.
        engine: What to run: ``torch``, or the engine of an export of the model.
        with_base: Of a run, measure the unpruned base too.
        base: Where the base lies now, if it was moved.
        device: ``auto``, ``cpu`` or ``cuda``.
        on_progress: Is told (source, segments done, all segments), and ("tasks", answers scored,
            all answers).

    Raises:
        LpdeployError: Model, data, a task or the segment length cannot be used.
    """
    device = resolve_device(device)
    get_engine(engine).check(device)
    if with_base:
        check_has_base(model)
    place = locate_model(model)
    tasks = _load_tasks(options)  # before the model: they are refused sooner than it is loaded
    if place.run is not None:  # before hours of work, whose result goes into this file
        place.run.check_files(place.run.evaluation)
    with place.hold(shared=True):
        runner = load_place(place, engine, device=device)
        result = Evaluation(
            model=str(model),
            model_sha256=_get_sha256(place),
            engine=engine,
            precision=runner.precision,
            seq_len=options.seq_len,
            figures=_measure(runner, place.folder, place.folder, options, tasks, on_progress),
        )
        if with_base and place.run is not None:
            base = find_base(place.run.load_plan(), base)
            del runner  # one model in memory at a time
            runner = load_torch_runner(base, device=device)
            # Conversations are written as the run writes them, so that both read the same text.
            figures = _measure(runner, base, place.folder, options, tasks, on_progress)
            result = replace(result, base=figures)
        if place.run is not None:
            in_part = options.max_segments is not None or options.limit is not None
            _merge_into(place.run, result, in_part=in_part)
    return result


def _merge_into(run: RunFolder, result: Evaluation, *, in_part: bool) -> None:
    run.check_files(run.evaluation)
    with run.recorded(run.evaluation):
        old = load_evaluation(run.evaluation, fix="Delete it.")
        merged = result.merge(old, in_part=in_part) if old else result
        pairs = [(result.figures, merged.figures), (result.base, merged.base)]
        if any(new and not new.is_within(kept or Figures()) for new, kept in pairs):
            logger.info(
                "'%s' keeps the figures of an earlier evaluation on more segments or documents, "
                "and no others that are not comparable with them.",
                run.evaluation,
            )
        save_json(run.evaluation, merged.to_json())


def _get_sha256(place: ModelPlace) -> str | None:
    record = place.load_record()
    return record.sha256 if record else None


def _load_tasks(options: EvalOptions) -> Any:
    if not options.tasks:
        return None
    return _import_harness().load_tasks(
        options.tasks, task_data=options.task_data, num_fewshot=options.num_fewshot
    )


def _import_harness() -> ModuleType:
    try:
        from lpdeploy.evaluation import harness
    except ImportError:
        raise MissingDependencyError(
            "lm-eval is not installed; `tasks` needs it. "
            "Install with: pip install 'lpdeploy[eval]'."
        ) from None
    return harness


def _measure(
    runner: Runner,
    model: Path,
    words: Path,
    options: EvalOptions,
    tasks: Any,
    on_progress: Progress,
) -> Figures:
    """Measure a model on texts that the tokenizer in the folder ``words`` writes."""
    config = load_config(model)
    tokenizer = load_tokenizer(words, load_config(words))
    perplexities, metrics = {}, {}
    for source in options.perplexity:
        perplexities[source] = compute_perplexity(
            runner,
            load_corpus(source, split="test"),
            tokenizer,
            seq_len=options.seq_len,
            max_segments=options.max_segments,
            batch_size=options.batch_size,
            on_progress=functools.partial(on_progress, source),
        )
    if tasks is not None:
        metrics = _import_harness().run_tasks(
            tasks,
            runner,
            tokenizer,
            stop_tokens=list_stop_tokens(model, config),
            limit=options.limit,
            batch_size=options.batch_size,
            on_progress=functools.partial(on_progress, TASKS),
        )
    return Figures(perplexities, metrics)
