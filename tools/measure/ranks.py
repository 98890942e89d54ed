"""Measure how much of a sharded base a rank holds, and how much two ranks send each other.

    python -m tools.measure.ranks --output docs/measurements/ranks-cpu.json

The script starts two ranks over gloo on this machine, with a LLaMA of random weights. Memory is
that of the process without the files it maps (RssAnon), sampled while the base is loaded. Messages
are the tensors handed to torch.distributed in two steps, beside what `compute_travel` counts.
"""

import dataclasses
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import distributed as dist
from transformers import LlamaConfig

from lpdeploy.benchmark.random_models import save_random_model
from lpdeploy.config import PruneConfig
from lpdeploy.models.loading import load_config
from lpdeploy.models.sharded import is_shard, load_sharded_model
from lpdeploy.pruning.ranks import join_ranks
from lpdeploy.pruning.run import prune
from lpdeploy.pruning.travel import compute_travel
from tools.measure.common import build_parser, save_measurement, save_word_tokenizer

RANKS = 2
_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
SHAPE = {
    "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12,
    "num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 512,
}  # fmt: skip
# The ratio is less than a group: steps score, and nothing goes.
OPTIONS: dict[str, Any] = {
    "steps": 2, "batch_size": 4, "micro_batch_size": 1, "seq_len": 32, "ratio": 1e-4,
    "calibration_samples": 0, "prune_every": 1, "ramp": "paper", "device": "cpu",
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "lora": {},
    "wanda": {"criterion": "wanda"},
    "lora, sharded": {"shard": True, "removal": "mask"},
}


def read_anonymous_bytes() -> int:
    """Return the memory of this process that belongs to no file."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def measure_load(load: Callable[[], Any]) -> dict[str, int]:
    """Return the memory that loading a model adds: at its peak, and afterwards."""
    gc.collect()
    before, samples, done = read_anonymous_bytes(), [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.002):
            samples.append(read_anonymous_bytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    model = load()
    done.set()
    sampler.join()
    held = read_anonymous_bytes() - before
    parameters = list(model.parameters())
    own = sum(p.to_local().nbytes if is_shard(p) else p.nbytes for p in parameters)
    return {
        "weight_bytes": sum(p.numel() * p.element_size() for p in parameters),
        "own_bytes": own,
        "held_bytes": held,
        "peak_bytes": max(samples) - before,
    }


def count_messages(folder: Path, options: PruneConfig) -> dict[str, int]:
    """Return the bytes of a step's messages: summed over the ranks, and gathered from them."""
    counts = {"summed": 0, "gathered": 0}

    def counted(name: str, kind: str) -> Any:
        function = getattr(dist, name)

        def call(tensor: Any, *arguments: Any, **rest: Any) -> Any:
            counts[kind] += tensor.numel() * tensor.element_size()
            return function(tensor, *arguments, **rest)

        return mock.patch.object(dist, name, call)

    with ExitStack() as stack:
        stack.enter_context(counted("all_reduce", "summed"))
        stack.enter_context(counted(_GATHER, "gathered"))
        data, output = str(folder / "text.txt"), folder / "run"
        prune(str(folder / "model"), output, data=data, options=options, overwrite=True)
    return {kind: count // OPTIONS["steps"] for kind, count in counts.items()}


def measure_rank(folder: Path) -> None:
    """Measure on one of the ranks; the first one writes the result."""
    torch.set_num_threads(1)
    ranks = join_ranks(PruneConfig(device="cpu", batch_size=8))
    model = folder / "model"
    load = measure_load(lambda: load_sharded_model(model, dtype="fp32", device=torch.device("cpu")))
    messages = {}
    for name, changes in RUNS.items():
        options = PruneConfig(**{**OPTIONS, **changes})
        travel = compute_travel(load_config(model), options, ranks=RANKS, itemsize=4)
        messages[name] = count_messages(folder, options) | {
            "computed": dataclasses.asdict(travel),
        }
    if ranks.is_first:
        (folder / "measured.json").write_text(json.dumps({"load": load, "messages": messages}))


def main() -> None:
    """Make the model, start the ranks, and write the JSON."""
    output = build_parser(__doc__).parse_args().output
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_random_model(LlamaConfig(**SHAPE), folder / "model")
        save_word_tokenizer(folder / "model", ["<unk>", *"abcdefgh"])
        (folder / "text.txt").write_text("a b c d e f g h " * 400, encoding="utf-8")
        start = time.perf_counter()
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
        module = ["-m", "tools.measure.ranks", str(folder)]
        subprocess.run([sys.executable, *launcher, *module], check=True)
        measured = json.loads((folder / "measured.json").read_text(encoding="utf-8"))
    seconds = round(time.perf_counter() - start, 1)
    about = {"ranks": RANKS, "shape": SHAPE, "options": OPTIONS, "seconds": seconds}
    save_measurement(output, {**about, **measured})


if __name__ == "__main__":
    if "RANK" in os.environ:
        measure_rank(Path(sys.argv[1]))
    else:
        main()
