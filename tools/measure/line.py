"""Measure the whole line on one model, and write one JSON that documents quote.

    python tools/measure.py MODEL --train train.txt --valid valid.txt --output x.json

For each ratio: prune, compact, evaluate, export and verify through the command line, then one
interleaved latency benchmark over all of them. Everything is a fact of the commands' own JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lpdeploy.artifacts import save_json


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
        "training": summarise_log(run / "log.jsonl"),
        "compact": {key: compacted[key] for key in ("architecture", "parameters", "bytes")},
        "perplexity": next(iter(evaluated["perplexity"].values())),
        "base_perplexity": next(iter(evaluated["base"]["perplexity"].values())),
        "verify": call("verify", run)["pairs"],
    }


def list_training(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options of prune that this script takes."""
    return {
        "steps": options.steps,
        "batch-size": options.batch_size,
        "micro-batch-size": options.batch_size,
        "seq-len": options.seq_len,
        "lr": options.lr,
        "seed": options.seed,
    }


def summarise_log(path: Path) -> dict[str, float]:
    """Return the share of scoring, and how the step's time falls as groups go."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [line for line in lines if line["step"]]  # 0 is the calibration
    scored = [step for step in steps if step["scoring_seconds"] > 0]
    last_event = max((s["step"] for s in steps if s["removed"]), default=0)
    first_event = min((s["step"] for s in steps if s["removed"]), default=0)
    before = [s["seconds"] for s in steps if 1 < s["step"] < first_event]
    after = [s["seconds"] for s in steps if s["step"] > last_event]
    return {
        "scoring_share": statistics.median(s["scoring_seconds"] / s["seconds"] for s in scored),
        "step_seconds_before_first_event": statistics.median(before),
        "step_seconds_after_last_event": statistics.median(after),
        "tokens_per_step": round(steps[-1]["tokens_per_s"] * steps[-1]["seconds"]),
    }


def main() -> None:
    """Read the command line, measure, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--train", required=True)
    parser.add_argument("--valid", required=True)
    parser.add_argument("--output", type=Path, required=True)
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
    save_json(options.output, build_document(options, measured, bench))


def build_document(
    options: argparse.Namespace, runs: list[dict[str, Any]], bench: dict[str, Any]
) -> dict[str, Any]:
    """Put the figures beside what they depend on; paths are cut to their last part."""
    names = ("model", "train", "valid")
    values = {k: Path(v).name if k in names else v for k, v in vars(options).items()}
    values.pop("output")
    rows = [{key: value for key, value in row.items() if key != "model"} for row in bench["rows"]]
    machine = {k: v for k, v in bench["machine"].items() if k != "command"}
    words = ["python tools/measure.py", values.pop("model")]
    for key, value in values.items():
        words += [f"--{key.replace('_', '-')}", *(value if isinstance(value, list) else [value])]
    command = " ".join(map(str, words))
    return {
        "machine": machine,
        "command": command,
        "options": values,
        "runs": runs,
        "latency": rows,
    }


if __name__ == "__main__":
    main()
