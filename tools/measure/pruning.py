"""Run the same pruning run twice, once cutting and once masking, and compare every step.

    python -m tools.measure.pruning MODEL --output docs/measurements/pruning-run-cpu.json
    python -m tools.measure.pruning MODEL --data train.txt --valid valid.txt --output x.json

Both runs see the same rows, each in its own process, and take their steps in turn, so that other
work on the machine slows both. A MODEL folder with nothing but a config.json gets random weights,
which cost the same. Without --data the runs see random tokens. A plot is written beside the JSON.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lpdeploy.benchmark.plot import draw_run_costs
from lpdeploy.benchmark.pruning import run_interleaved
from lpdeploy.benchmark.pruning_worker import Prepared, PruningVariant, StepCost, start_pruning
from lpdeploy.config import PruneConfig
from tools.measure.common import build_parser, report, save_measurement

REMOVALS = ("cut", "mask")


def summarize(prepared: Prepared, costs: Sequence[StepCost], loss: float | None) -> dict[str, Any]:
    """Add up a run, and compare its steps after the last event with those before the first."""
    steps = [cost for cost in costs if cost.ratio < costs[-1].ratio or not cost.cutting]
    before = [cost.seconds for cost in steps if cost.ratio == 0]
    after = [cost.seconds for cost in steps if cost.ratio == costs[-1].ratio]
    total = sum(cost.seconds for cost in costs)
    scoring, cutting = (
        sum(getattr(cost, name) for cost in costs) for name in StepCost._fields[1:3]
    )
    return {
        "seconds": total,
        "training_s": total - scoring - cutting,
        "scoring_s": scoring,
        "cutting_s": cutting,
        "scoring_share": scoring / total,
        "step_s_before": statistics.median(before),
        "step_s_after": statistics.median(after),
        "after_over_before": statistics.median(after) / statistics.median(before),
        "loss": statistics.mean(cost.loss for cost in costs[-5:]),
        "valid_perplexity": None if loss is None else math.exp(loss),
        "weight_bytes": prepared.weight_bytes,
        "process_bytes": prepared.process_bytes,
        "steps": [cost._asdict() for cost in costs],
    }


def main() -> None:
    """Read the command line, measure, and write JSON and plot."""
    parser = build_parser(__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data")
    parser.add_argument("--valid")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--prune-every", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--ramp", default="early")
    parser.add_argument("--device", default="auto")
    given = vars(parser.parse_args())
    model, output, data, valid = (given.pop(name) for name in ("model", "output", "data", "valid"))
    options = PruneConfig(**given, calibration_samples=0)
    with ExitStack() as stack:
        workers = [
            stack.enter_context(
                start_pruning(
                    PruningVariant(
                        model, dataclasses.replace(options, removal=removal), data, valid
                    )
                )
            )
            for removal in REMOVALS
        ]
        scored = workers[0].call("score")
        done = iter(range(1, given["steps"] + 1))
        costs = run_interleaved(workers, given["steps"], lambda: report(next(done), given["steps"]))
        losses = [worker.call("evaluate") if valid else None for worker in workers]
        described = [worker.described for worker in workers]
    runs = {
        removal: summarize(*one)
        for removal, *one in zip(REMOVALS, described, costs, losses, strict=True)
    }
    cut, mask = (runs[name] for name in REMOVALS)
    save_measurement(
        output,
        {
            "model": model.name,
            "options": given,
            "cut_over_mask": cut["seconds"] / mask["seconds"],
            "late_cut_over_mask": compare_late(cut["steps"], mask["steps"]),
            "runs": runs,
            "scoring_seconds": scored.seconds,
            "scoring_bytes": scored.bytes,
        },
    )
    output.with_suffix(".svg").write_text(
        draw_run_costs({name: run["steps"] for name, run in runs.items()}), encoding="utf-8"
    )


def compare_late(cut: Sequence[Mapping[str, Any]], mask: Sequence[Mapping[str, Any]]) -> float:
    """Return the median of cut over mask in the last quarter of the steps.

    A masked step costs the same throughout, so this also says how much faster a late step is than
    an early one, whatever else the machine did meanwhile.
    """
    pairs = list(zip(cut, mask, strict=True))[-max(1, len(cut) // 4) :]
    return statistics.median(ours["seconds"] / theirs["seconds"] for ours, theirs in pairs)


if __name__ == "__main__":
    main()
