"""Measure what distillation costs: its steps, and the pass of the unpruned model before them.

    python -m tools.measure.distill MODEL --train train.txt --output docs/measurements/distill.json
        [-- PRUNE_OPTIONS as NAME=VALUE ...]

Two trainings with the same options take turns, one step of each at a time, so that the machine is
as busy for both. Pruning is over after a few steps; the medians are of the steps behind it.
"""

import json
import logging
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from lpdeploy.config import PruneConfig
from lpdeploy.data.batches import TokenDataset
from lpdeploy.models.loading import compute_model_sha256
from lpdeploy.pruning.distillation import prepare_teacher
from lpdeploy.pruning.ranks import join_ranks
from lpdeploy.pruning.setup import Source, build_training, load_dataset, load_source
from lpdeploy.pruning.teacher import Teacher
from lpdeploy.pruning.training import run_steps
from tools.measure.common import build_parser, save_measurement

OPTIONS: dict[str, Any] = {
    "steps": 40, "batch_size": 16, "micro_batch_size": 16, "seq_len": 256, "lora_dropout": 0.0,
    "ramp": "early", "calibration_samples": 16, "device": "cpu", "lr": 1e-3,
}  # fmt: skip


def run_teacher(
    source: Source, dataset: TokenDataset, options: PruneConfig
) -> tuple[Teacher, float, int]:
    """Make the cache; return what reads it, the seconds it took and its bytes."""
    sha256 = compute_model_sha256(source.folder)
    start = time.perf_counter()
    teacher = prepare_teacher(source, dataset, options, join_ranks(options), base_sha256=sha256)
    seconds = time.perf_counter() - start
    assert teacher is not None
    folder = Path(os.environ["LPDEPLOY_CACHE"])
    # As long as the whole data set, with holes where rows are not needed.
    size = sum(512 * path.stat().st_blocks for path in (folder / "teachers").rglob("tokens"))
    return teacher, seconds, size


def time_steps(
    source: Source, dataset: TokenDataset, options: PruneConfig, teacher: Teacher
) -> dict[str, list[float]]:
    """Run both trainings in turns; return the seconds of each step, in order."""
    plain = build_training(source, dataset, replace(options, distill=None), None)
    taught = build_training(source, dataset, options, None, teacher=teacher)
    seconds: dict[str, list[float]] = {"plain": [], "taught": []}
    for one, other in zip(run_steps(plain), run_steps(taught), strict=True):
        seconds["plain"].append(one.seconds)
        seconds["taught"].append(other.seconds)
        print(f"\rstep {one.step} of {one.steps}", end="", file=sys.stderr, flush=True)
    return seconds


def main() -> None:
    """Read the command line, measure, and write the JSON."""
    parser = build_parser(__doc__)
    parser.add_argument("model")
    parser.add_argument("--train", required=True)
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    given = parser.parse_args(words[:end])
    own = {
        name: json.loads(value) for name, _, value in (w.partition("=") for w in words[end + 1 :])
    }
    logging.basicConfig(level=logging.WARNING)
    options = PruneConfig(**{**OPTIONS, "distill": 0.5, **own})
    source = load_source(given.model, options)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["LPDEPLOY_CACHE"] = scratch
        dataset = load_dataset(source, given.train, options)
        teacher, seconds, size = run_teacher(source, dataset, options)
        times = time_steps(source, dataset, options, teacher)
    behind = max(2, options.steps // 2) if options.steps else 2
    pairs = list(zip(times["plain"][behind:], times["taught"][behind:], strict=True))
    ratios = sorted(taught / plain for plain, taught in pairs)
    save_measurement(given.output, {
        "model": Path(given.model).name,
        "options": {**OPTIONS, **own, "distill": 0.5},
        "step_ratio": {
            "median": statistics.median(ratios),
            "quartiles": statistics.quantiles(ratios, n=4)[::2],
            "steps": len(ratios),
        },
        "step_seconds": {
            name: statistics.median(values[behind:]) for name, values in times.items()
        },
        "teacher_seconds": seconds,
        "teacher_bytes": size,
        "training_seconds": sum(times["taught"]),
        "teacher_share": seconds / sum(times["taught"]),
    })  # fmt: skip


if __name__ == "__main__":
    main()
