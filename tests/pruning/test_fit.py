"""What is refused for want of memory, and what is suggested instead."""

import dataclasses
import json

import pytest
import torch
from transformers import LlamaConfig

from lpdeploy.config import PruneConfig
from lpdeploy.errors import LpdeployError
from lpdeploy.pruning import fit
from lpdeploy.pruning.fit import (
    check_memory,
    measure_cgroup_bytes,
    measure_free_bytes,
    suggest_options,
)
from lpdeploy.pruning.memory import MemoryPlan
from lpdeploy.pruning.run import prune

CONFIG = LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
    num_attention_heads=32, dtype=torch.bfloat16,
)  # fmt: skip
OPTIONS = PruneConfig(device="cpu", dtype="bf16")


def plan_by(count):
    """A planner by a formula that a test can follow."""

    def plan(options):
        return MemoryPlan(0, 0, 0, 0, count(options), 0)

    return plan


def suggest(options, free, count):
    change = suggest_options(options, free, plan_by(count))
    return change and change[0]


def test_the_largest_smaller_micro_batch_that_fits_comes_first():
    options = PruneConfig(batch_size=12, micro_batch_size=6, device="cpu")
    assert suggest(options, 45, lambda o: 10 * o.micro_batch_size) == "--micro-batch-size 4"
    assert suggest(options, 30, lambda o: 10 * o.micro_batch_size) == "--micro-batch-size 3"


def test_then_checkpointing_then_8_bits_then_shorter_rows():
    options = PruneConfig(micro_batch_size=1, device="cpu")
    assert suggest(options, 5, lambda o: 5 if o.gradient_checkpointing else 9) == (
        "--gradient-checkpointing"
    )
    assert suggest(options, 5, lambda o: 5 if o.load_in else 9) == "--load-in 8bit"
    assert suggest(options, 200, lambda o: o.seq_len) == "--seq-len 128"


def test_true_gradients_are_off_loaded_on_a_gpu_and_never_in_8_bits(monkeypatch):
    options = PruneConfig(criterion="gradient", micro_batch_size=1)
    monkeypatch.setattr(fit, "resolve_device", lambda _: "cuda")
    assert suggest(options, 5, lambda o: 5 if o.offload_gradients else 9) == "--offload-gradients"
    monkeypatch.setattr(fit, "resolve_device", lambda _: "cpu")
    assert suggest(options, 5, lambda o: 5 if o.offload_gradients or o.load_in else 9) is None


def test_what_no_single_change_can_do_several_do_together():
    options = PruneConfig(batch_size=4, micro_batch_size=4, seq_len=512, device="cpu")

    def count(o):
        return 10 * o.micro_batch_size + (0 if o.gradient_checkpointing else 20)

    assert suggest(options, 12, count) == "--micro-batch-size 1 --gradient-checkpointing"
    assert suggest(options, 9, count) is None


def refuse(monkeypatch, free, options=OPTIONS, **arguments):
    monkeypatch.setattr(fit, "measure_free_bytes", lambda _: free)
    lines = []
    plan = check_memory(CONFIG, options, log=lines.append, **arguments)
    return plan, lines


def test_a_run_that_cannot_fit_is_refused_with_what_would(monkeypatch):
    with pytest.raises(
        LpdeployError,
        match=r"This run needs about \d+.* GB of memory, and 30 GB are free. Use --micro-batch-"
        r"size 1, which needs about .* GB, or --ignore-memory to start all the same",
    ):
        refuse(monkeypatch, 30_000_000_000)


def test_a_base_in_shards_needs_a_share_of_its_layers_and_stays_in_full():
    sharded = dataclasses.replace(OPTIONS, shard=True, removal="mask")
    whole, half = (fit.plan_run(CONFIG, sharded, ranks=ranks) for ranks in (1, 2))
    layer = 2 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert whole.weights - half.weights == 16 * layer - 2 * layer  # two are gathered at a time
    assert half.activations == whole.activations
    one = dataclasses.replace(sharded, micro_batch_size=1)
    assert suggest(one, 5, lambda o: 5 if o.load_in else 9) is None


def test_where_nothing_helps_it_says_so(monkeypatch):
    with pytest.raises(LpdeployError, match="makes it fit: use a smaller model or a machine with"):
        refuse(monkeypatch, 1_000_000_000)


def test_a_plan_may_be_wrong_and_what_is_near_starts(monkeypatch):
    plan, lines = refuse(monkeypatch, 100_000_000_000)
    needed = plan.total - plan.process - plan.heap
    refuse(monkeypatch, int(0.86 * needed))
    with pytest.raises(LpdeployError, match="This run needs"):
        refuse(monkeypatch, int(0.84 * needed))
    assert lines[0].startswith("memory: about ")
    assert "of 100 GB that are free" in lines[0]
    assert "activations" in lines[0]
    assert "gradients" not in lines[0]  # lora has none


def test_who_wants_to_starts_all_the_same(monkeypatch):
    anyway = dataclasses.replace(OPTIONS, ignore_memory=True)
    assert refuse(monkeypatch, 1_000_000_000, anyway)[0].weights > 13e9
    assert refuse(monkeypatch, 1_000_000_000, refuse=False)[0].weights > 13e9
    _, lines = refuse(monkeypatch, None)  # a system that does not tell
    assert "free" not in lines[0]


def test_prune_refuses_before_it_reads_anything(base, data, tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "measure_free_bytes", lambda _: 1000)
    options = PruneConfig(steps=1, batch_size=2, micro_batch_size=2, seq_len=24, device="cpu")
    with pytest.raises(LpdeployError, match="--ignore-memory"):
        prune(str(base), tmp_path / "run", data="nowhere.txt", options=options)
    assert not (tmp_path / "run").exists()
    options = dataclasses.replace(options, ignore_memory=True, round_to=4)
    prune(str(base), tmp_path / "run", data=str(data), options=options)
    stage = json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"]["prune"]
    planned = stage["planned_bytes"]
    assert planned["total"] == sum(v for name, v in planned.items() if name != "total")
    assert planned["weights"] > 0


def test_free_memory_of_this_machine_is_told():
    free = measure_free_bytes("cpu")
    assert free is None or free > 1_000_000


def write_group(folder, names, limit, used, cached):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\nactive_file 1\n")


def test_the_tightest_limit_of_a_control_group_counts(tmp_path):
    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    names = ("memory.max", "memory.current")
    write_group(root / "a", names, 1000, 700, 99)
    write_group(root / "a" / "b", names, "max", 600, 0)
    write_group(root, names, 5000, 1, 0)
    membership.write_text("0::/a/b\n")
    assert measure_cgroup_bytes(root, membership) == 400  # what files take is given back
    (root / "a" / "memory.max").write_text("max\n")
    assert measure_cgroup_bytes(root, membership) == 5000  # 1 is used, 1 given back


def test_control_groups_of_the_first_version(tmp_path):
    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    write_group(root / "memory" / "job", names, 1000, 400, 0)
    membership.write_text("9:cpu:/job\n4:memory:/job\n0::/\n")
    assert measure_cgroup_bytes(root, membership) == 601


def test_no_control_group_no_limit(tmp_path):
    assert measure_cgroup_bytes(tmp_path, tmp_path / "missing") is None
    (tmp_path / "membership").write_text("0::/\n")
    assert measure_cgroup_bytes(tmp_path, tmp_path / "membership") is None
