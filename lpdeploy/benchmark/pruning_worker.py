"""One pruning run in a process of its own, a step at a time: its memory and threads are its own."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PretrainedConfig

from lpdeploy.benchmark.random_models import build_random_model
from lpdeploy.benchmark.worker import (
    Served,
    Timing,
    Worker,
    read_bytes,
    reset_peak,
    time_work,
)
from lpdeploy.config import PruneConfig
from lpdeploy.data.batches import TokenDataset, pack_rows
from lpdeploy.families.groups import list_group_specs
from lpdeploy.models.find import list_weight_files
from lpdeploy.models.loading import PRECISIONS, load_config, load_model, resolve_device
from lpdeploy.pruning.fit import plan_run
from lpdeploy.pruning.setup import Source, build_training, load_dataset, load_source
from lpdeploy.pruning.training import Training, run_forward, run_steps


@dataclass(frozen=True)
class PruningVariant:
    """A run whose cost is measured.

    Attributes:
        model: Folder of a checkpoint, or of a config alone for random weights.
        options: How it is pruned; its ``steps`` are those that may be asked for.
        data: Data source; None for random tokens.
        valid: Held-out data to evaluate on; None for none.
    """

    model: Path
    options: PruneConfig
    data: str | None = None
    valid: str | None = None


class Prepared(NamedTuple):
    """What a variant says of itself before its first step.

    Attributes:
        precision: What it computes in.
        weight_bytes: Of the frozen base.
        process_bytes: What the process held before it loaded anything; 0 on a GPU.
        planned_bytes: What ``plan_memory`` says that it will need, the process included.
    """

    precision: str
    weight_bytes: int
    process_bytes: int
    planned_bytes: int


class StepCost(NamedTuple):
    """What one step took.

    Attributes:
        seconds: Of the whole step.
        scoring: Seconds of it that scoring took.
        cutting: Seconds of it that choosing and removing groups took.
        peak_bytes: Peak memory in it, of the device or the process; None if unknown.
        held_bytes: Memory after it, likewise.
        loss: Mean cross-entropy of the batch in nats, before the step.
        ratio: Share of groups that is gone after it.
    """

    seconds: float
    scoring: float
    cutting: float
    peak_bytes: int | None
    held_bytes: int | None
    loss: float
    ratio: float


def load_pruning(variant: PruningVariant) -> Served:
    """Make a run ready; describes it by ``Prepared``; answers ``step``, ``score``, ``evaluate``."""
    config, options = load_config(variant.model), variant.options
    device = resolve_device(options.device)
    plan = plan_run(config, options)
    source, dataset = build_source(variant)
    load = load_model if list_weight_files(variant.model) else make_loader(config, device)
    training = build_training(source, dataset, options, None, load=load)
    steps = run_steps(training)

    def answer(what: str) -> Any:
        match what:
            case "evaluate":
                return evaluate(training, load_dataset(source, str(variant.valid), options))
            case "score":
                return measure_scoring(training, device=device)
            case _:
                return run_step(steps, device=device)

    return describe(training, plan.process, plan.total), answer


def start_pruning(variant: PruningVariant) -> Worker:
    """Make a run ready in a process of its own."""
    return Worker(partial(load_pruning, variant))


def make_loader(config: PretrainedConfig, device: str) -> Callable[..., Any]:
    """Return what takes the place of ``load_model`` where there are no weights to load."""

    def load(_: Path, *, dtype: str, load_in: str | None = None, **__: Any) -> Any:
        return build_random_model(config, dtype=dtype, device=device, load_in=load_in)

    return load


def build_source(variant: PruningVariant) -> tuple[Source, TokenDataset]:
    """Find the base, and what it is pruned with: the same rows for every variant."""
    options = variant.options
    if variant.data is not None:
        source = load_source(str(variant.model), options)
        return source, load_dataset(source, variant.data, options)
    config = load_config(variant.model)
    specs = list_group_specs(config, heads=options.widths.heads)
    source = Source(variant.model.name, variant.model, config, None, specs, specs)
    return source, build_random_dataset(
        config.vocab_size, rows=8 * options.batch_size, seq_len=options.seq_len
    )


def build_random_dataset(vocab_size: int, *, rows: int, seq_len: int) -> TokenDataset:
    """Draw rows of full length; what a step costs does not depend on which tokens it sees."""
    tokens = np.random.default_rng(0).integers(vocab_size, size=rows * seq_len, dtype=np.int32)
    return pack_rows(tokens, seq_len=seq_len)


def describe(training: Training, process: int, planned: int) -> Prepared:
    """Count what a run is made of."""
    frozen = [p for p in training.model.parameters() if not p.requires_grad]
    sizes = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in frozen}
    # Of 8-bit weights, the scales are no parameters.
    scales = [s for p in frozen if (s := getattr(p, "SCB", None)) is not None]
    weights = sum(sizes.values()) + sum(scale.nbytes for scale in scales)
    dtype = training.state.model.get_input_embeddings().weight.dtype
    return Prepared(PRECISIONS[dtype], weights, process, planned)


def run_step(steps: Iterator[Any], *, device: str) -> StepCost:
    """Run the next step of a run, with a peak of its own."""
    reset_peak(device)
    info = next(steps)
    return StepCost(
        seconds=info.seconds,
        scoring=info.scoring_seconds,
        cutting=info.cutting_seconds,
        peak_bytes=read_bytes(device, peak=True),
        held_bytes=read_bytes(device),
        loss=info.loss,
        ratio=info.ratio,
    )


def measure_scoring(training: Training, *, device: str) -> Timing:
    """Score once, from the gradients of one row, and forget it; what it took beside the model."""
    scorer = training.state.scorer
    ids = training.dataset.collate([0])["input_ids"].to(training.device)
    with scorer.observe():
        run_forward(training, ids, ids, targets=ids.numel()).backward()
    timing = time_work(scorer.compute_importance, device=device)
    training.optimizer.zero_grad()
    return timing


@torch.no_grad()
def evaluate(training: Training, dataset: TokenDataset) -> float:
    """Return the mean cross-entropy of held-out rows in nats a token; masks stay in place."""
    training.model.eval()
    total, count = 0.0, 0
    for row in range(len(dataset)):
        batch = dataset.collate([row])
        ids = batch["input_ids"].to(training.device)
        total += run_forward(training, ids, ids, targets=1).item()
        count += ids.numel() - 1
    training.model.train()
    return total / count
