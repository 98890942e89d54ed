"""Measure what a refit costs: an event against the steps beside it, and one layer of a 7B model.

    python -m tools.measure.refit MODEL --train train.txt --output docs/measurements/refit-cost.json
    python -m tools.measure.refit MODEL --train train.txt --memory --output x.json

Events are compared with the steps before them in the same run, since the machine is as busy for
both. The layer is the down_proj of a LLaMA-7B at 50 %, with random inputs: the sums are timed over
a few thousand tokens and scaled to those that a refit takes; the solution does not depend on them.

With `--memory`, the peak memory of a process with a refit is compared with that of one without.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from lpdeploy.config import PruneConfig
from lpdeploy.machine import measure_peak_bytes
from lpdeploy.pruning.least_squares import RIDGES, make_sums, solve
from lpdeploy.pruning.refit import TOKENS_A_COLUMN
from lpdeploy.pruning.run import prune
from tools.measure.common import build_parser, save_measurement

KEPT, HIDDEN, BATCH, BATCHES = 5504, 4096, 2048, 4
MEMORY = {
    "steps": 2, "prune_every": 1, "batch_size": 4, "micro_batch_size": 4, "seq_len": 256,
    "criterion": "gate", "calibration_samples": 4, "lora_dropout": 0.0, "device": "cpu",
}  # fmt: skip
STEPS = {"steps": 100, "batch_size": 16, "micro_batch_size": 16, "seq_len": 256, "lr": 1e-3}


def time_events(model: str, data: str, criterion: str) -> list[dict[str, float]]:
    """Run a joint pruning with a refit, and compare each event with the steps before it."""
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        config = PruneConfig(
            **STEPS, criterion=criterion, refit=True, lora_dropout=0.0, device="cpu"
        )  # type: ignore[arg-type]
        prune(model, run, data=data, options=config)
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps = [line["seconds"] - line["cutting_seconds"] for line in lines]
    events = [place for place, line in enumerate(lines) if line["removed"]]
    return [
        {
            "step": lines[place]["step"],
            "seconds": lines[place]["cutting_seconds"],
            "steps_worth": lines[place]["cutting_seconds"]
            / statistics.median(steps[max(1, place - 5) : place + 1]),
        }
        for place in events
    ]


def compare_memory(model: str, data: str) -> dict[str, Any]:
    """Prune in processes of their own, with and without a refit, and compare their memory."""
    found: dict[str, Any] = {"options": MEMORY}
    for name, own in {"plain": {}, "refit": {"refit": True}}.items():
        with tempfile.TemporaryDirectory() as scratch:
            recipe, run = Path(scratch) / "recipe.yaml", Path(scratch) / "run"
            recipe.write_text(yaml.safe_dump({"prune": {**MEMORY, **own}}))
            words = [sys.executable, "-m", "lpdeploy", "prune", model, "--data", data]
            words += ["--recipe", str(recipe), "--output", str(run)]
            subprocess.run(words, check=True)
            stage = json.loads((run / "manifest.json").read_text())["stages"]["prune"]
            found[name] = {"peak_bytes": stage["peak_bytes"], "planned": stage["planned_bytes"]}
    found["ratio"] = found["refit"]["peak_bytes"] / found["plain"]["peak_bytes"]
    return found


def measure_layer(kept: int, hidden: int, *, batch: int, batches: int) -> dict[str, Any]:
    """Time the sums and the solution of one weight with random inputs."""
    generator = torch.Generator().manual_seed(0)
    fitted, held_out = (make_sums(torch.empty(hidden, kept)) for _ in range(2))
    seconds = []
    for place in range(batches):
        inputs = torch.randn(batch, kept, generator=generator)
        missing = torch.randn(batch, hidden, generator=generator)
        start = time.perf_counter()
        (held_out if place % 2 else fitted).add(inputs, missing)
        seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
    solve(fitted, held_out)
    solving = time.perf_counter() - start
    tokens = TOKENS_A_COLUMN * kept
    adding = statistics.median(seconds) / batch * tokens
    flops = 2 * tokens * kept * (kept + hidden)
    # A Cholesky factor, two triangular solutions and a loss for each ridge, and the final solution.
    work = (len(RIDGES) + 1) * (kept**3 / 3 + 2 * kept**2 * hidden) + len(
        RIDGES
    ) * 2 * kept**2 * hidden
    return {
        "kept": kept,
        "hidden": hidden,
        "tokens": tokens,
        "gram_bytes": 4 * kept * kept,
        "sums_seconds": adding,
        "sums_gflops_per_second": flops / adding / 1e9,
        "solve_seconds": solving,
        "solve_gflops_per_second": work / solving / 1e9,
        "peak_bytes": measure_peak_bytes(),
    }


def main() -> None:
    """Read the command line, measure, and write the JSON."""
    parser = build_parser(__doc__)
    parser.add_argument("model")
    parser.add_argument("--train", required=True)
    parser.add_argument("--memory", action="store_true")
    arguments = parser.parse_args()
    if arguments.memory:
        document = {
            "model": Path(arguments.model).name,
            **compare_memory(arguments.model, arguments.train),
        }
        save_measurement(arguments.output, document)
        return
    layer = measure_layer(KEPT, HIDDEN, batch=BATCH, batches=BATCHES)
    events = {
        criterion: time_events(arguments.model, arguments.train, criterion)
        for criterion in ("lora", "obs")
    }
    document = {"layer": layer, "events": events}
    save_measurement(arguments.output, document)


if __name__ == "__main__":
    main()
