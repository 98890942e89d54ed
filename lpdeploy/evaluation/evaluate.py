"""The eval stage: perplexity of a model, or of a run's model and its base, on several texts."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lpdeploy.artifacts import save_json
from lpdeploy.data.sources import load_corpus
from lpdeploy.errors import ArtifactError
from lpdeploy.evaluation.perplexity import compute_perplexity
from lpdeploy.models.compact import find_base
from lpdeploy.models.loading import (
    load_config,
    load_tokenizer,
    resolve_device,
    resolve_model,
)
from lpdeploy.plan import load_plan
from lpdeploy.runtime.onnx_runner import load_onnx_runner
from lpdeploy.runtime.runner import Runner
from lpdeploy.runtime.torch_runner import load_torch_runner

EVAL = "eval.json"
Progress = Callable[[str, int, int], None]


def evaluate(
    target: str,
    sources: Sequence[str],
    *,
    seq_len: int = 2048,
    engine: str = "torch",
    with_base: bool = False,
    device: str = "auto",
    on_progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """Measure perplexity on each source.

    Args:
        target: Model folder, hub name, or a run, whose compacted model is taken.
        sources: Texts: files, folders or hub names.
        seq_len: Tokens a segment.
        engine: ``torch``, or ``onnx`` for the target's exported graph.
        with_base: Of a run, measure the unpruned base too.
        device: ``auto``, ``cpu`` or ``cuda``.
        on_progress: Is told (source, segments done, all segments).

    Returns:
        ``{"perplexity": {source: {"perplexity", "bits_per_byte", "tokens"}}}``, and the same of
        the base under ``base``. Of a run it is also written to its ``eval.json``.

    Raises:
        LpdeployError: Model, data or segment length cannot be used.
    """
    run = Path(target)
    is_run = (run / "plan.json").is_file()
    if with_base and not is_run:
        raise ArtifactError(f"--with-base needs a run; '{target}' has no plan.json. Leave it out.")
    device = resolve_device(device)
    model = _find_model(target, is_run=is_run)
    exported = (run if is_run else model) / "onnx"
    runner = _load_runner(model, exported, engine=engine, device=device)
    result: dict[str, Any] = {
        "model": target,
        "engine": engine,
        "precision": runner.precision,
        "seq_len": seq_len,
        "perplexity": _measure(runner, model, sources, seq_len=seq_len, on_progress=on_progress),
    }
    if with_base:
        base = find_base(load_plan(run))
        del runner  # one model in memory at a time
        runner = _load_runner(base, base / "onnx", engine="torch", device=device)
        measured = _measure(runner, base, sources, seq_len=seq_len, on_progress=on_progress)
        result["base"] = {"perplexity": measured}
    if is_run:
        save_json(run / EVAL, result)
    return result


def _find_model(target: str, *, is_run: bool) -> Path:
    if not is_run:
        return resolve_model(target)
    model = Path(target) / "model"
    if not model.is_dir():
        raise ArtifactError(f"No model in '{target}'. Run 'lpdeploy compact {target}' first.")
    return model


def _load_runner(model: Path, exported: Path, *, engine: str, device: str) -> Runner:
    if engine == "onnx":
        return load_onnx_runner(exported, device=device)
    return load_torch_runner(model, device=device)


def _measure(
    runner: Runner, model: Path, sources: Sequence[str], *, seq_len: int, on_progress: Progress
) -> dict[str, Any]:
    tokenizer = load_tokenizer(model, load_config(model))
    measured = {}
    for source in sources:
        corpus = load_corpus(source, split="test")

        def report(done: int, total: int, source: str = source) -> None:
            on_progress(source, done, total)

        perplexity = compute_perplexity(
            runner, corpus, tokenizer, seq_len=seq_len, on_progress=report
        )
        measured[source] = dataclasses.asdict(perplexity)
    return measured
