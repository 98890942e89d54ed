"""Run one rank of test_ranks.py: ``python -m tests.slow.pruning.rank_worker ROOT``.

``run_alone`` makes the runs of one process that theirs are compared with.
"""

import importlib.util
import json
import os
import shutil
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from lpdeploy.benchmark.target import resolve_options
from lpdeploy.config import PruneConfig
from lpdeploy.errors import LpdeployError, OtherRankError
from lpdeploy.models.loading import load_model
from lpdeploy.models.sharded import list_own_rows, load_sharded_model
from lpdeploy.pruning import ranks, run
from lpdeploy.pruning.scoring import Scorer

# Without dropout, whose masks are a rank's own.
OPTIONS = {
    "ratio": 0.5, "steps": 6, "batch_size": 8, "micro_batch_size": 2, "seq_len": 24, "lr": 1e-2,
    "prune_every": 2, "ramp": "authors", "round_to": 4, "lora_dropout": 0.0, "device": "cpu",
}  # fmt: skip
KEEPS_ALL = 1e-3  # events with nothing to remove, since a group is more than that
SHARD = {"removal": "mask", "shard": True}
# name -> (model, data, options)
CASES = {
    "mha-lora": ("mha", "text.txt", {}),
    "mha-gradient": ("mha", "text.txt", {"criterion": "gradient", "offload_gradients": True}),
    "mha-random": ("mha", "text.txt", {"criterion": "random"}),
    "mha-wanda-mask": ("mha", "text.txt", {"criterion": "wanda", "removal": "mask"}),
    # Rows of unequal lengths; 10 rows of calibration leave one micro-batch for two ranks.
    "gqa-gate": ("gqa", "pairs.jsonl", {"criterion": "gate", "calibration_samples": 10}),
    "gqa-wanda": ("gqa", "pairs.jsonl", {"criterion": "wanda", "calibration_samples": 10}),
    "gqa-refit": ("gqa", "pairs.jsonl", {"refit": True}),
    "gqa-obs": ("gqa", "text.txt", {"criterion": "obs", "refit": True}),
    "gqa-distill": ("gqa", "pairs.jsonl", {"distill": 0.5}),
    "mha-refit-mask": ("mha", "text.txt", {"refit": True, "removal": "mask"}),
    "gqa-lora-mask": ("gqa", "text.txt", {"removal": "mask"}),
    "mha-shard": ("mha", "text.txt", SHARD),
    "gqa-shard-gate": ("gqa", "pairs.jsonl", SHARD | {"criterion": "gate"}),
    "gqa-shard-recomputed": ("gqa", "text.txt", SHARD | {"gradient_checkpointing": True}),
    # Biases, tied embeddings, per-Linear norms of scores, and a number of rows that is odd.
    "odd-shard-wanda": ("odd", "text.txt", SHARD | {"criterion": "wanda", "normalize": True}),
}  # fmt: skip
if importlib.util.find_spec("bitsandbytes"):
    CASES["gqa-8bit"] = ("gqa", "text.txt", {"load_in": "8bit"})
COUNTED = (
    *("mha-lora", "mha-gradient", "mha-wanda-mask", "gqa-gate"),
    *("mha-shard", "gqa-shard-recomputed"),
)


def prune(root, name, output, *, on_step=lambda _: None, stop=None, **changes):
    model, data, options = CASES[name]
    chosen = PruneConfig(**{**OPTIONS, **options, **changes})
    data = str(root / data)
    given = {"data": data, "options": chosen, "on_step": on_step, "stop": stop}
    run.prune(str(root / model), root / output, **given)


def choose_rates(root, name, **changes):
    """Return the losses after trials of learning rates."""
    model, data, options = CASES[name]
    config = PruneConfig(**{**OPTIONS, **options, "lr": "auto", **changes})
    _, record = resolve_options(str(root / model), config, data=str(root / data))
    return {trial.lr: trial.loss for trial in record.rates}


def run_alone(root):
    for name in CASES:
        prune(root, name, f"one/{name}", shard=False)


def run_with_others(root, rank):
    for name in CASES:
        prune(root, name, f"two/{name}")
    answers = {
        "own_rows": compare_rows(root),
        "unusable": {
            name: catch(load_sharded_model, root / name, dtype="fp32", device=torch.device("cpu"))
            for name in ("lacking", "misshapen", "damaged")
        },
        "messages": count_messages(root),
        "refused": catch(prune, root, "mha-lora", "two/refused", micro_batch_size=8),
        "infinite": catch(prune, root, "mha-lora", "two/infinite", lr=1e30, lr_warmup=0.0),
        "ended": catch(stop_at_step_3, root),
        "rates": {name: choose_rates(root, name) for name in ("gqa-refit", "gqa-shard-gate")},
        "rate_options": catch(choose_rates, root, "mha-lora", seed=rank),
        "options": catch(prune, root, "mha-lora", "two/options", seed=rank),
    }
    # A rank that does not take part in what makes random scores the same.
    if rank == 1:
        Scorer.compute_importance = draw_alone
    answers["groups"] = catch(prune, root, "mha-random", "two/groups", checkpoint_every=2)
    return answers


def stop_at_step_3(root):
    """Stop from the callback, which only the first rank calls."""
    stop = threading.Event()
    prune(
        root, "mha-lora", "two/ended", stop=stop,
        on_step=lambda info: stop.set() if info.step == 3 else None,
    )  # fmt: skip


def count_messages(root):
    """Prune nothing, and list the bytes of each message: sums over the ranks, gathered weights."""
    sizes = {"summed": [], "gathered": []}

    def counted(function, kind):
        def call(tensor, *arguments, **options):
            sizes[kind].append(tensor.numel() * tensor.element_size())
            return function(tensor, *arguments, **options)

        return call

    gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    names = {"all_reduce": "summed", gather: "gathered"}
    counts = {}
    for name in COUNTED:
        sizes["summed"], sizes["gathered"] = [], []
        with pytest.MonkeyPatch.context() as patch:
            for function, kind in names.items():
                patch.setattr(dist, function, counted(getattr(dist, function), kind))
            prune(root, name, "two/counted", ratio=KEEPS_ALL, calibration_samples=0)
        dist.barrier()  # the first rank writes after the others are done
        if dist.get_rank() == 0:
            shutil.rmtree(root / "two" / "counted")
        dist.barrier()
        counts[name] = dict(sizes)
    return counts


def draw_alone(self, kept=None, compute=Scorer.compute_importance):
    return {name: torch.randn(len(own)).abs() for name, own in compute(self, kept).items()}


def catch(work, *arguments, **options):
    try:
        work(*arguments, **options)
    except OtherRankError:
        return "silent"
    except LpdeployError as error:
        return str(error)
    return None


def compare_rows(root):
    """Compare what a rank holds with its rows of the whole model, and list how many they are."""
    whole = load_model(root / "odd", dtype="fp32")
    shard = load_sharded_model(root / "odd", dtype="fp32", device=torch.device("cpu"))
    counts = {}
    for (name, expected), (_, own) in zip(
        whole.named_parameters(), shard.named_parameters(), strict=True
    ):
        rows = list_own_rows(own)
        local = own.to_local() if hasattr(own, "to_local") else own
        assert torch.equal(local, expected[rows.start : rows.stop])
        counts[name] = len(rows)
    return counts


def wait_for_peer(folder, rank):
    """Sum with a rank that answers at first and then no more, in a group that waits 2 seconds."""
    dist.destroy_process_group()
    place = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", place, timedelta(seconds=2), world_size=2, rank=rank)
    joined, value = ranks.Ranks(rank, 2), torch.ones(3)
    joined.sum([value])
    assert value.tolist() == [2, 2, 2]
    return catch(joined.sum, [value]) if rank == 0 else time.sleep(4)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    answers = run_with_others(folder, rank) | {"hanging": wait_for_peer(folder, rank)}
    (folder / f"answers-{rank}.json").write_text(json.dumps(answers))
