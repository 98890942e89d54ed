"""Measure seconds and memory of a pruning step by criterion (Table 4): parts of `suite.py`.

Weights are random and made on the device, one module at a time, and 8-bit ones directly as codes,
so that nothing larger than the model is ever in memory. The variants run one after another in this
process, and each frees its memory before the next one starts.
"""

import copy
import gc
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lpdeploy.benchmark.pruning import WARM_UPS, PruningWorkload, build_result, run_interleaved
from lpdeploy.benchmark.pruning_worker import Prepared, PruningVariant, StepCost, load_pruning
from lpdeploy.config import PruneConfig
from lpdeploy.pruning.fit import measure_free_bytes, plan_run

MICRO_BATCHES = (8, 4, 2, 1)


@dataclass(frozen=True)
class PruningSize:
    """The size of a step.

    Attributes:
        batch_size: Sequences a step; the paper takes 128.
        seq_len: Tokens of each.
        steps: Steps that are timed, after the warm-up.
        small_batch: Sequences of a step whose memory is measured at a micro-batch of 1.
    """

    batch_size: int
    seq_len: int
    steps: int
    small_batch: int


SIZES = {"7b": PruningSize(128, 512, 3, 8), "tiny": PruningSize(4, 16, 1, 2)}
VARIANTS: tuple[dict[str, Any], ...] = (
    {"criterion": "lora"},
    {"criterion": "gradient"},
    {"criterion": "magnitude"},
    {"criterion": "lora", "load_in": "8bit"},
)
LORA: tuple[dict[str, Any], ...] = ({"criterion": "lora"},)
OFF_LOADED: tuple[dict[str, Any], ...] = (
    {"criterion": "gradient"},
    {"criterion": "gradient", "offload_gradients": True},
)


class Run:
    """A pruning run of this process."""

    def __init__(self, variant: PruningVariant) -> None:
        """Build the model, on its device."""
        self.described: Prepared
        self.described, self.call = load_pruning(variant)


def build_options(suite: Any, size: PruningSize, **changes: Any) -> PruneConfig:
    """Return the options that all variants share."""
    dtype = "fp32" if suite.precision == "fp32" else "bf16"
    return PruneConfig(
        **{
            "batch_size": size.batch_size,
            "micro_batch_size": 1,
            "seq_len": size.seq_len,
            "round_to": suite.size.round_to,
            "dtype": dtype,
            "device": suite.device,
            **changes,
        }
    )


def choose_micro_batch(config: Any, options: PruneConfig, variants: Sequence[Any]) -> int:
    """Return the largest micro-batch at which every variant fits according to its memory plan."""
    free = measure_free_bytes(options.device)
    for micro in MICRO_BATCHES:
        if options.batch_size % micro == 0:
            workload = PruningWorkload(with_micro_batch(options, micro), steps=1)
            plans = [plan_run(config, workload.build_options(**own)) for own in variants]
            if free is None or max(plan.total for plan in plans) < 0.9 * free:
                return micro
    return 1


def with_micro_batch(options: PruneConfig, micro: int) -> PruneConfig:
    """Return the same options with another micro-batch."""
    return PruneConfig(**{**vars(options), "micro_batch_size": micro})


def measure(config: Any, workload: PruningWorkload, variants: Sequence[Any]) -> dict[str, Any]:
    """Run the variants, one after another, and make their rows."""
    measured = []
    with tempfile.TemporaryDirectory(prefix="lpdeploy-gpu-") as folder:
        config.save_pretrained(folder)
        for changes in variants:
            options = workload.build_options(**changes)
            print(f"   {changes}", file=sys.stderr, flush=True)
            prepared, costs = take_steps(PruningVariant(Path(folder), options), workload)
            measured.append((options, prepared, costs))
    result = build_result(config, workload, measured, interleaved=False).to_json()
    return {key: result[key] for key in ("workload", "rows")}


def take_steps(
    variant: PruningVariant, workload: PruningWorkload
) -> tuple[Prepared, list[StepCost]]:
    """Run one variant and free its memory."""
    run = Run(variant)
    rounds = WARM_UPS + workload.steps + workload.steps_after
    (costs,) = run_interleaved([run], rounds, lambda: None)
    described = run.described
    del run
    gc.collect()
    if variant.options.device != "cpu":
        torch.cuda.empty_cache()
    return described, costs


def run_pruning(suite: Any) -> Any:
    """Time a step by criterion at the paper's batch, and memory at its micro-batch of 1."""
    size = SIZES[suite.name]
    config = suite.build_config(suite.size.heads, suite.size.channels)
    options = build_options(suite, size)
    micro = choose_micro_batch(config, options, VARIANTS)
    timed = PruningWorkload(with_micro_batch(options, micro), size.steps)
    small = PruningWorkload(build_options(suite, size, batch_size=size.small_batch), steps=1)
    return {
        **measure(config, timed, VARIANTS),
        "micro_batch_1": measure(config, small, VARIANTS),
    }


def run_offloading(suite: Any) -> Any:
    """Measure true gradients with and without off-loading (Table 6), at a small batch."""
    size = SIZES[suite.name]
    config = suite.build_config(suite.size.heads, suite.size.channels)
    options = build_options(suite, size, batch_size=size.small_batch)
    micro = choose_micro_batch(config, options, OFF_LOADED[:1])
    return measure(config, PruningWorkload(with_micro_batch(options, micro), 1), OFF_LOADED)


def run_65b(suite: Any) -> Any:
    """Measure a base of LLaMA-65B's shapes in 8 bits on one GPU.

    Where all 80 layers do not fit, runs of 8 and of 16 layers say what one layer adds.
    """
    size = SIZES[suite.name]
    config = suite.build_config(suite.size.heads, suite.size.channels)
    if suite.name != "tiny":
        config.update({"hidden_size": 8192, "num_hidden_layers": 80, "intermediate_size": 22016,
                       "num_attention_heads": 64, "num_key_value_heads": 64})  # fmt: skip
    options = build_options(
        suite, size, batch_size=size.small_batch, gradient_checkpointing=True, load_in="8bit"
    )
    workload = PruningWorkload(options, steps=1)
    plan = plan_run(config, options)
    free = measure_free_bytes(suite.device)
    planned = {"planned_bytes": plan.to_json()}
    if suite.name != "tiny" and (free is None or plan.total < free):
        return {**planned, **measure(config, workload, LORA)}
    layers, counts = config.num_hidden_layers, (1, 2) if suite.name == "tiny" else (8, 16)
    parts = [measure(with_layers(config, count), workload, LORA) for count in counts]
    return {**planned, "parts": parts, "extrapolated": extrapolate(parts, counts, layers)}


def with_layers(config: Any, count: int) -> Any:
    """Return the same config with another number of layers."""
    changed = copy.deepcopy(config)
    changed.num_hidden_layers = count
    return changed


def extrapolate(
    parts: Sequence[Mapping[str, Any]], counts: tuple[int, int], layers: int
) -> dict[str, float]:
    """Extend seconds and bytes of two numbers of layers along a straight line."""
    first, second = (part["rows"][0] for part in parts)
    share = (layers - counts[0]) / (counts[1] - counts[0])
    names = ("step_ms", "scoring_ms", "weight_bytes", "peak_bytes")
    known = [name for name in names if first[name] is not None]
    result = {name: first[name] + share * (second[name] - first[name]) for name in known}
    return {"layers": layers, **result}
