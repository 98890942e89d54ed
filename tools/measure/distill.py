"""Measure what distillation costs: its steps, and the pass of the unpruned model before them.

    python -m tools.measure.distill MODEL --train train.txt --output docs/measurements/distill.json
        [-- PRUNE_OPTIONS as NAME=VALUE ...]

Two trainings with the same options take turns, one step of each at a time, so that the machine is
as busy for both. Pruning is over after a few steps; the medians are of the steps behind it.
"""

import logging
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from lpdeploy.config import PruneConfig
from lpdeploy.data.batches import TokenDataset
from lpdeploy.models.loading import compute_model_sha256
from lpdeploy.pruning.distillation import prepare_teacher
from lpdeploy.pruning.ranks import join_ranks
from lpdeploy.pruning.setup import Source, build_training, load_dataset, load_source
from lpdeploy.pruning.teacher import Teacher
from tools.measure.common import save_measurement
from tools.measure.turns import OPTIONS, compare_steps, parse_study, take_turns


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
    return take_turns({
        "plain": build_training(source, dataset, replace(options, distill=None), None),
        "taught": build_training(source, dataset, options, None, teacher=teacher),
    })  # fmt: skip


def main() -> None:
    """Read the command line, measure, and write the JSON."""
    given, own = parse_study(__doc__)
    logging.basicConfig(level=logging.WARNING)
    options = PruneConfig(**{**OPTIONS, "distill": 0.5, **own})
    source = load_source(given.model, options)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["LPDEPLOY_CACHE"] = scratch
        dataset = load_dataset(source, given.train, options)
        teacher, seconds, size = run_teacher(source, dataset, options)
        times = time_steps(source, dataset, options, teacher)
    save_measurement(given.output, {
        "model": Path(given.model).name,
        "options": {**OPTIONS, **own, "distill": 0.5},
        "step_ratio": compare_steps(times["plain"], times["taught"]),
        "step_seconds": {
            name: statistics.median(values[len(values) // 2 :]) for name, values in times.items()
        },
        "teacher_seconds": seconds,
        "teacher_bytes": size,
        "training_seconds": sum(times["taught"]),
        "teacher_share": seconds / sum(times["taught"]),
    })  # fmt: skip


if __name__ == "__main__":
    main()
