"""Steps of several trainings that take turns, so that the machine is as busy for all of them."""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from lpdeploy.pruning.training import Training, run_steps
from tools.measure.common import build_parser

OPTIONS: dict[str, Any] = {
    "steps": 40, "batch_size": 16, "micro_batch_size": 16, "seq_len": 256, "lora_dropout": 0.0,
    "ramp": "early", "calibration_samples": 16, "device": "cpu", "lr": 1e-3,
}  # fmt: skip


def take_turns(trainings: Mapping[str, Training]) -> dict[str, list[float]]:
    """Run one step of each in turn, to the end; return the seconds of their steps, in order."""
    seconds: dict[str, list[float]] = {name: [] for name in trainings}
    for infos in zip(*map(run_steps, trainings.values()), strict=True):
        for name, info in zip(trainings, infos, strict=True):
            seconds[name].append(info.seconds)
        print(f"\rstep {infos[0].step} of {infos[0].steps}", end="", file=sys.stderr, flush=True)
    return seconds


def compare_steps(base: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    """Return how much longer the steps of one of two trainings in turn took.

    Pruning is over after a few steps; only the second half counts.
    """
    behind = max(2, len(base) // 2)
    ratios = sorted(b / a for a, b in zip(base[behind:], other[behind:], strict=True))
    return {
        "median": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios, n=4)[::2],
        "steps": len(ratios),
    }


def parse_study(description: str | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Read a command line with a model, ``--train``, and options of prune behind ``--``."""
    parser = build_parser(description)
    parser.add_argument("model")
    parser.add_argument("--train", required=True)
    words, own = split_options(sys.argv[1:])
    return parser.parse_args(words), own


def split_options(words: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Split a command line at ``--``, behind which options of prune stand as NAME=VALUE."""
    end = words.index("--") if "--" in words else len(words)
    pairs = (word.partition("=") for word in words[end + 1 :])
    return words[:end], {name: json.loads(value) for name, _, value in pairs}
