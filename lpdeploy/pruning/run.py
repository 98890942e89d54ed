"""The prune stage: from a model and a data source to a run folder."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file

from lpdeploy.artifacts import (
    MANIFEST,
    Stage,
    atomic_file,
    atomic_folder,
    compute_sha256,
    record_stage,
    remove_leftovers,
    save_json,
)
from lpdeploy.errors import ArtifactError, NonFiniteError
from lpdeploy.models.loading import (
    compute_model_sha256,
)
from lpdeploy.models.quantized import check_load_in
from lpdeploy.models.servers import list_verdicts
from lpdeploy.models.shapes import compute_achieved
from lpdeploy.plan import PruningPlan
from lpdeploy.pruning.check import describe_servers, forecast_config
from lpdeploy.pruning.checkpoint import (
    CHECKPOINT,
    Checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from lpdeploy.pruning.options import PruneOptions
from lpdeploy.pruning.setup import (
    Source,
    build_training,
    describe_start,
    load_dataset,
    load_source,
)
from lpdeploy.pruning.state import PruningState
from lpdeploy.pruning.training import StepInfo, Training, run_steps

LOG = "log.jsonl"
# What lpdeploy's stages write into a run, and so what --overwrite may delete.
_OWN_FILES = (
    *("plan.json", "adapter", "importance.safetensors", LOG, MANIFEST, "recipe.yaml"),
    *("checkpoint", "model", "unmerged", "onnx", "onnx-unmerged", "verify.json", "eval.json"),
    *("bench.json", "bench.md", "bench.svg", "samples.json", "report.html"),
)
_LOSS_WINDOW = 10


@dataclass(frozen=True)
class PruneResult:
    """What ``prune`` did, as its JSON says it.

    Attributes:
        run: The folder it wrote.
        ratio: Share of groups asked to be removed.
        achieved: Share removed, of groups, heads, channels and parameters.
        steps: Optimizer steps.
        seconds: Of the whole stage.
        peak_bytes: Peak memory of the device or the process.
        loss: Mean of the last steps' losses, in nats a token; of one-shot, before the removal.
    """

    run: str
    ratio: float
    achieved: Mapping[str, float]
    steps: int
    seconds: float
    peak_bytes: int
    loss: float


def prune(  # noqa: PLR0913 - what the command takes, and two callbacks
    model: str,
    output: Path,
    *,
    data: str,
    options: PruneOptions,
    resume: bool = False,
    overwrite: bool = False,
    on_step: Callable[[StepInfo], None] = lambda _: None,
    log: Callable[[str], None] = lambda _: None,
) -> PruneResult:
    """Prune a model while it fine-tunes with LoRA (Algorithm 1), and write a run folder.

    Args:
        model: Hugging Face folder or hub name.
        output: The run folder: plan.json, adapter/, importance.safetensors, log.jsonl,
            manifest.json, recipe.yaml, and checkpoint/ while running.
        data: Data source (file, folder or hub name).
        options: How to prune.
        resume: Go on from the checkpoint in ``output``.
        overwrite: Replace a run that is already there.
        on_step: Called after every optimizer step.
        log: Is told what is about to run, before the first step.

    Raises:
        LpdeployError: Model, data or output cannot be used, or a loss is not finite.
    """
    check_load_in(options.load_in, removal=options.removal)  # before anything is read
    source = load_source(model, options)
    _check_output(output, base=source.folder, resume=resume, overwrite=overwrite)
    record = {"model": model, "data": data, **dataclasses.asdict(options)}
    with record_stage(output, "prune", record) as stage:
        dataset = load_dataset(source, data, options)
        stage.inputs = {
            "base": compute_model_sha256(source.folder),
            "data": dataset.compute_sha256(),
        }
        checkpoint = (
            load_checkpoint(output, options=options, inputs=stage.inputs) if resume else None
        )
        training = build_training(source, dataset, options, checkpoint)
        log(describe_start(source, training))
        log(describe_servers(list_verdicts(forecast_config(source.config, options))))
        if not resume:
            _clear_output(output)  # only now: bad input must not cost the run that is there
        _save_recipe(output, record)
        losses = _run(output, training, checkpoint, stage=stage, on_step=on_step)
        plan = _build_plan(source, training.state, options, stage.inputs["base"])
        _save_run(output, training, plan, stage)
    return PruneResult(
        run=str(output),
        ratio=options.ratio,
        achieved=plan.achieved,
        steps=training.steps,
        seconds=stage.seconds,
        peak_bytes=stage.peak_bytes,
        loss=sum(losses) / len(losses),
    )


def _check_output(output: Path, *, base: Path, resume: bool, overwrite: bool) -> None:
    if base.resolve().is_relative_to(output.resolve()):
        raise ArtifactError(f"'{output}' holds the model to be pruned. Use another --output.")
    present = [name for name in _OWN_FILES if (output / name).exists()]
    if present and not (resume or overwrite):
        raise ArtifactError(
            f"'{output}' already holds a run ({', '.join(present)}). Use --resume to go on from "
            "its checkpoint, --overwrite to replace it, or another --output."
        )
    if resume and "plan.json" in present:
        raise ArtifactError(
            f"Nothing to resume: the run in '{output}' is complete. "
            f"Go on with 'lpdeploy compact {output}'."
        )


def _clear_output(output: Path) -> None:
    """Delete what lpdeploy wrote to a run before, and nothing else."""
    output.mkdir(parents=True, exist_ok=True)
    for name in _OWN_FILES:
        path = output / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        remove_leftovers(path)


def _run(
    output: Path,
    training: Training,
    checkpoint: Checkpoint | None,
    *,
    stage: Stage,
    on_step: Callable[[StepInfo], None],
) -> list[float]:
    """Run the steps, log each, save checkpoints; return the last losses."""
    done = None if checkpoint is None else checkpoint.step
    _trim_log(output, done or 0)
    losses: list[float] = []
    options = training.options
    try:
        for info in run_steps(training, start=done):
            done = info.step
            # A calibration's loss is that of the unpruned model: it counts where nothing follows.
            losses = [*(losses if done > 1 else []), info.loss][-_LOSS_WINDOW:]
            _append_log(output, info)
            on_step(info)
            every = options.checkpoint_every
            if every and done % every == 0 and done < training.steps:
                _save_checkpoint(output, training, done, stage)
    except NonFiniteError as error:
        if done is None:
            hint = "No step was done: check the model and the data, or use --dtype fp32."
            raise NonFiniteError(f"{error} {hint}") from error
        _save_checkpoint(output, training, done, stage)
        raise NonFiniteError(
            f"{error} The state after step {done} is kept in '{output / CHECKPOINT}'. "
            f"Lower --lr (it was {options.lr:g}) and go on with --resume."
        ) from error
    return losses


def _save_checkpoint(output: Path, training: Training, step: int, stage: Stage) -> None:
    save_checkpoint(
        output, step=step, training=training, options=training.options, inputs=stage.inputs
    )


def _append_log(output: Path, info: StepInfo) -> None:
    # One write to a file opened for appending: a kill leaves whole lines only.
    line = json.dumps(dataclasses.asdict(info)) + "\n"
    handle = os.open(output / LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, line.encode())
    finally:
        os.close(handle)


def _trim_log(output: Path, done: int) -> None:
    """Drop the log's lines of steps that a resumed run does again."""
    path = output / LOG
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
        with atomic_file(path) as temporary:
            kept = [line for line in lines if json.loads(line)["step"] <= done]
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def _save_recipe(output: Path, record: Mapping[str, Any]) -> None:
    with atomic_file(output / "recipe.yaml") as temporary:
        temporary.write_text(yaml.safe_dump({"prune": dict(record)}, sort_keys=False))


def _build_plan(
    source: Source, state: PruningState, options: PruneOptions, sha256: str
) -> PruningPlan:
    kept = state.list_kept(source.specs)
    return PruningPlan(
        base_model=str(source.folder.resolve()) if Path(source.name).is_dir() else source.name,
        base_sha256=sha256,
        ratio=options.ratio,
        specs=source.specs,
        kept=kept,
        achieved=compute_achieved(source.config, source.specs, kept),
    )


def _save_run(output: Path, training: Training, plan: PruningPlan, stage: Stage) -> None:
    """Write the results; plan.json comes last, so that a run with a plan is complete."""
    training.state.cut_masked()
    with atomic_folder(output / "adapter", overwrite=True) as temporary:
        # Asking the hub whether the vocabulary grew (peft's "auto") would need a network.
        training.model.save_pretrained(str(temporary), save_embedding_layers=False)
    with atomic_file(output / "importance.safetensors") as path:
        save_file(training.state.last_seen, path)
    stage.outputs = {"adapter": compute_sha256(output / "adapter")}
    save_json(output / "plan.json", plan.to_json())
    shutil.rmtree(output / "checkpoint", ignore_errors=True)
