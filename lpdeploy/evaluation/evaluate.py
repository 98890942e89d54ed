"""The eval stage: perplexity and tasks, of a model, or of a run's model and its base."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from lpdeploy.artifacts import load_json, save_json
from lpdeploy.data.sources import load_corpus
from lpdeploy.engines import get_engine
from lpdeploy.engines.exports import load_place
from lpdeploy.engines.runner import Runner
from lpdeploy.engines.torch.runner import load_torch_runner
from lpdeploy.errors import ArtifactError, MissingDependencyError
from lpdeploy.evaluation.options import EvalOptions
from lpdeploy.evaluation.perplexity import compute_perplexity
from lpdeploy.evaluation.tasks import compute_average
from lpdeploy.models.compact import find_base
from lpdeploy.models.loading import (
    load_config,
    load_tokenizer,
    resolve_device,
)
from lpdeploy.models.place import ModelPlace, locate_model
from lpdeploy.run_folder import RunFolder

TASKS = "tasks"
"""What ``on_progress`` is told as the source while tasks are run."""
Progress = Callable[[str, int, int], None]
_ENGINE = ("engine", "precision")


def evaluate(
    target: str | os.PathLike[str],
    options: EvalOptions,
    *,
    engine: str = "torch",
    with_base: bool = False,
    device: str = "auto",
    on_progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """Measure perplexity on texts, and accuracy on tasks.

    Of a run, the result is also written to its ``eval.json``, beside what is there already of the
    same model on the same engine in the same precision (perplexities only of the same segment
    length), and ``average`` then covers the tasks of both. What is there of another engine or
    precision moves into its list ``others``; figures of another model are dropped.

    Args:
        target: Model folder, hub name, or a run, whose compacted model is taken.
        options: What to measure.
        engine: What to run: ``torch``, or the engine of an export of the target.
        with_base: Of a run, measure the unpruned base too.
        device: ``auto``, ``cpu`` or ``cuda``.
        on_progress: Is told (source, segments done, all segments), and ("tasks", answers scored,
            all answers).

    Returns:
        ``{"perplexity": {source: {"perplexity", "bits_per_byte", "tokens"}}}``; with tasks also
        ``{"tasks": {name: {"acc", "acc_stderr", ..., "n"}}, "average", "average_over"}``; and the
        same of the base under ``base``.

    Raises:
        LpdeployError: Model, data, a task or the segment length cannot be used.
    """
    device = resolve_device(device)
    get_engine(engine).check(device)
    if with_base and not RunFolder(target).is_complete:
        raise ArtifactError(f"`with_base=True` needs a run, and '{target}' is none. Leave it out.")
    place = locate_model(target)
    tasks = _load_tasks(options)  # before the model: they are refused sooner than it is loaded
    with place.hold(shared=True):
        runner = load_place(place, engine, device=device)
        result: dict[str, Any] = {
            "model": str(target),
            "model_sha256": _get_sha256(place),
            "engine": engine,
            "precision": runner.precision,
            "seq_len": options.seq_len,
            **_measure(runner, place.folder, options, tasks, on_progress),
        }
        if with_base and place.run is not None:
            base = find_base(place.run.load_plan())
            del runner  # one model in memory at a time
            runner = load_torch_runner(base, device=device)
            result["base"] = _measure(runner, base, options, tasks, on_progress)
        if place.run is not None:
            path = place.run.evaluation
            old = load_json(path, fix="Delete it.") if path.is_file() else {}
            save_json(path, _merge(old, result, options))
    return result


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
            "lm-eval is not installed; --tasks needs it. "
            "Install with: pip install 'lpdeploy[eval]'."
        ) from None
    return harness


def _merge(old: dict[str, Any], new: dict[str, Any], options: EvalOptions) -> dict[str, Any]:
    """Put new figures beside those of earlier evaluations of the same model."""
    newest = {name: part for name, part in old.items() if name != "others"}
    merged, others = new, []
    for part in [newest, *old.get("others", [])] if old else []:
        if part.get("model_sha256") != new["model_sha256"]:
            continue
        if all(part[name] == new[name] for name in _ENGINE):
            merged = _merge_same(part, new, options)
        else:
            others.append(part)
    return merged | ({"others": others} if others else {})


def _merge_same(old: dict[str, Any], new: dict[str, Any], options: EvalOptions) -> dict[str, Any]:
    """Put new figures beside earlier ones of the same engine and precision."""
    keep = {"perplexity"} if old["seq_len"] == new["seq_len"] or not options.perplexity else set()
    merged = new | _merge_part(old, new, keep | {"tasks"})
    if "base" in old or "base" in new:
        merged["base"] = _merge_part(old.get("base", {}), new.get("base", {}), keep | {"tasks"})
    if not options.perplexity:
        merged["seq_len"] = old["seq_len"]
    return merged


def _merge_part(old: dict[str, Any], new: dict[str, Any], keep: set[str]) -> dict[str, Any]:
    part = {
        name: (old.get(name, {}) if name in keep else {}) | new.get(name, {})
        for name in ("perplexity", "tasks")
    }
    if not part["tasks"]:
        return {"perplexity": part["perplexity"]}
    return part | compute_average(part["tasks"])


def _measure(
    runner: Runner, model: Path, options: EvalOptions, tasks: Any, on_progress: Progress
) -> dict[str, Any]:
    tokenizer = load_tokenizer(model, load_config(model))
    measured: dict[str, Any] = {"perplexity": {}}
    for source in options.perplexity:
        corpus = load_corpus(source, split="test")

        def report(done: int, total: int, source: str = source) -> None:
            on_progress(source, done, total)

        perplexity = compute_perplexity(
            runner,
            corpus,
            tokenizer,
            seq_len=options.seq_len,
            batch_size=options.batch_size,
            on_progress=report,
        )
        measured["perplexity"][source] = dataclasses.asdict(perplexity)
    if tasks is not None:
        measured["tasks"] = _import_harness().run_tasks(
            tasks,
            runner,
            tokenizer,
            limit=options.limit,
            batch_size=options.batch_size,
            on_progress=lambda done, total: on_progress(TASKS, done, total),
        )
        measured |= compute_average(measured["tasks"])
    return measured
