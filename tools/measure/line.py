"""Measure the whole line on one model: quality, size, time and latency at several ratios.

    python -m tools.measure.line MODEL --train train.txt --valid valid.txt --output x.json

For each ratio the script runs prune, compact, eval, export and verify, and then one interleaved
latency benchmark over all of them. Every figure comes from the JSON that the commands print.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lpdeploy.pruning.log import load_log
from lpdeploy.run_folder import RunFolder
from tools.measure.common import build_parser, save_measurement


def call(*words: str | Path) -> dict[str, Any]:
    """Run an lpdeploy command and return the JSON on the last line of its stdout."""
    command = [sys.executable, "-m", "lpdeploy", *map(str, words), "--json"]
    print("+ lpdeploy", *words, file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_run(options: argparse.Namespace, ratio: float, run: Path) -> dict[str, Any]:
    """Take one model through the line at one ratio."""
    training = [f"--{name}={value}" for name, value in list_training(options).items()]
    pruned = call(
        "prune", options.model, "--data", options.train, "--output", run,
        f"--ratio={ratio}", *training,
    )  # fmt: skip
    compacted = call("compact", run)
    call("compact", run, "--keep-adapter")
    for form in ([], ["--unmerged"]):
        call("export", run, "--engine", "onnx", *form)
    evaluated = call(
        "eval", run, "--with-base", "--perplexity", options.valid, "--seq-len", options.seq_len
    )
    return {
        "ratio": ratio,
        "achieved": pruned["achieved"],
        "seconds": pruned["seconds"],
        "peak_bytes": pruned["peak_bytes"],
        "training": summarize_log(RunFolder(run)),
        "compact": {key: compacted[key] for key in ("architecture", "parameters", "bytes")},
        "perplexity": next(iter(evaluated["perplexity"].values())),
        "base_perplexity": next(iter(evaluated["base"]["perplexity"].values())),
        "verify": call("verify", run)["pairs"],
    }


def list_training(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that this script passes on to prune."""
    return {
        "steps": options.steps,
        "batch-size": options.batch_size,
        "micro-batch-size": options.batch_size,
        "seq-len": options.seq_len,
        "lr": options.lr,
        "seed": options.seed,
    }


def summarize_log(run: RunFolder) -> dict[str, float]:
    """Return the share of time spent scoring, and the time of a step before and after pruning."""
    steps = [info for info in load_log(run) if info.step]  # 0 is the calibration
    scored = [info for info in steps if info.scoring_seconds > 0]
    last_event = max((info.step for info in steps if info.removed), default=0)
    first_event = min((info.step for info in steps if info.removed), default=0)
    before = [info.seconds for info in steps if 1 < info.step < first_event]
    after = [info.seconds for info in steps if info.step > last_event]
    return {
        "scoring_share": statistics.median(info.scoring_seconds / info.seconds for info in scored),
        "step_seconds_before_first_event": statistics.median(before),
        "step_seconds_after_last_event": statistics.median(after),
        "tokens_per_step": round(steps[-1].tokens_per_s * steps[-1].seconds),
    }


def main() -> None:
    """Read the command line, measure, and write the JSON."""
    parser = build_parser(__doc__)
    parser.add_argument("model")
    parser.add_argument("--train", required=True)
    parser.add_argument("--valid", required=True)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.5])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=100)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lpdeploy-measure-") as folder:
        runs = {ratio: Path(folder) / f"pruned-{ratio}" for ratio in options.ratios}
        measured = [measure_run(options, ratio, run) for ratio, run in runs.items()]
        bench = call(
            "bench", "latency", *runs.values(), "--tokens", str(options.tokens),
            "--repeats", str(options.repeats),
        )  # fmt: skip
    given = {name: value for name, value in vars(options).items() if name != "output"}
    rows = [{key: value for key, value in row.items() if key != "model"} for row in bench["rows"]]
    names = {name: Path(given[name]).name for name in ("model", "train", "valid")}
    document = {"options": given | names, "runs": measured, "latency": rows}
    save_measurement(options.output, document)


if __name__ == "__main__":
    main()
