"""Measure what a higher rank of LoRA costs: the time of a step, and memory.

    python -m tools.measure.lora_rank MODEL --train train.txt --output docs/measurements/rank-cost.json
        [-- PRUNE_OPTIONS as NAME=VALUE ...]

Trainings of both ranks take turns, one step of each at a time. Bytes are those that the plan of
memory has for LoRA: weights, gradients and the state of the optimizer, for this model and for a 7B.
"""  # noqa: E501

import logging
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from lpdeploy.config import PruneConfig
from lpdeploy.pruning.memory import plan_memory
from lpdeploy.pruning.setup import build_training, load_dataset, load_source
from tools.measure.common import save_measurement
from tools.measure.turns import OPTIONS, compare_steps, parse_study, take_turns

RANKS = (8, 32)


def plan_adapters(config: Any, options: PruneConfig) -> dict[str, int]:
    """Return the planned bytes of LoRA at each rank."""
    changed = {str(rank): replace(options, lora_rank=rank) for rank in RANKS}
    plans = {
        name: plan_memory(config, each, dtype="bf16", device="cuda")
        for name, each in changed.items()
    }
    return {name: plan.adapters for name, plan in plans.items()}


def main() -> None:
    """Read the command line, measure, and write the JSON."""
    given, own = parse_study(__doc__)
    logging.basicConfig(level=logging.WARNING)
    options = PruneConfig(**{**OPTIONS, **own})
    source = load_source(given.model, options)
    dataset = load_dataset(source, given.train, options)
    times = take_turns({
        str(rank): build_training(
            source, dataset, replace(options, lora_rank=rank, lora_alpha=2.0 * rank), None
        )
        for rank in RANKS
    })  # fmt: skip
    first, second = times.values()
    save_measurement(given.output, {
        "model": Path(given.model).name,
        "options": {**OPTIONS, **own},
        "ranks": list(RANKS),
        "step_ratio": compare_steps(first, second),
        "step_seconds": {
            rank: statistics.median(values[len(values) // 2 :]) for rank, values in times.items()
        },
        "adapter_bytes": {
            Path(given.model).name: plan_adapters(source.config, options),
            "LLaMA-7B": plan_adapters(LlamaConfig(), options),
        },
    })  # fmt: skip


if __name__ == "__main__":
    main()
