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
    assert suggest(options, 45, lambda o: 10 * o.micro_batch_size) == {"micro_batch_size": 4}
    assert suggest(options, 30, lambda o: 10 * o.micro_batch_size) == {"micro_batch_size": 3}


def test_then_checkpointing_then_8_bits_then_shorter_rows():
    options = PruneConfig(micro_batch_size=1, device="cpu")
    assert suggest(options, 5, lambda o: 5 if o.gradient_checkpointing else 9) == {
        "gradient_checkpointing": True
    }
    assert suggest(options, 5, lambda o: 5 if o.load_in else 9) == {"load_in": "8bit"}
    assert suggest(options, 200, lambda o: o.seq_len) == {"seq_len": 128}


def test_true_gradients_are_off_loaded_on_a_gpu_and_never_in_8_bits(monkeypatch):
    options = PruneConfig(criterion="gradient", micro_batch_size=1)
    monkeypatch.setattr(fit, "resolve_device", lambda _: "cuda")
    off_loaded = suggest(options, 5, lambda o: 5 if o.offload_gradients else 9)
    assert off_loaded == {"offload_gradients": True}
    monkeypatch.setattr(fit, "resolve_device", lambda _: "cpu")
    assert suggest(options, 5, lambda o: 5 if o.offload_gradients or o.load_in else 9) is None


def test_what_no_single_change_can_do_several_do_together():
    options = PruneConfig(batch_size=4, micro_batch_size=4, seq_len=512, device="cpu")

    def count(o):
        return 10 * o.micro_batch_size + (0 if o.gradient_checkpointing else 20)

    assert suggest(options, 12, count) == {"micro_batch_size": 1, "gradient_checkpointing": True}
    assert suggest(options, 9, count) is None


def test_harmless_changes_together_come_before_a_harmful_one_alone():
    options = PruneConfig(batch_size=4, micro_batch_size=4, seq_len=512, device="cpu")

    def count(o):
        return o.micro_batch_size * o.seq_len + (0 if o.gradient_checkpointing else 100)

    assert suggest(options, 512, count) == {"micro_batch_size": 1, "gradient_checkpointing": True}


def refuse(monkeypatch, free, options=OPTIONS, **arguments):
    monkeypatch.setattr(fit, "measure_free_bytes", lambda _: free)
    return check_memory(CONFIG, options, **arguments)


def test_a_run_that_cannot_fit_is_refused_with_what_would(monkeypatch):
    with pytest.raises(
        LpdeployError,
        match=r"This run needs about \d+.* GB of memory, and 30 GB are free. Use `micro_batch_"
        r"size=1`, which needs about .* GB, or `ignore_memory=True` to start all the same",
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


def test_a_plan_may_be_wrong_and_what_is_near_starts(monkeypatch, caplog):
    caplog.set_level("INFO", logger="lpdeploy")
    plan = refuse(monkeypatch, 100_000_000_000)
    needed = plan.total - plan.process - plan.heap
    refuse(monkeypatch, int(0.86 * needed))
    with pytest.raises(LpdeployError, match="This run needs"):
        refuse(monkeypatch, int(0.84 * needed))
    line = caplog.messages[0]
    assert line.startswith("memory: about ")
    assert "of 100 GB that are free" in line
    assert "activations" in line
    assert "gradients" not in line  # lora has none


def test_who_wants_to_starts_all_the_same(monkeypatch):
    anyway = dataclasses.replace(OPTIONS, ignore_memory=True)
    assert refuse(monkeypatch, 1_000_000_000, anyway).weights > 13e9
    assert refuse(monkeypatch, 1_000_000_000, refuse=False).weights > 13e9


def test_prune_refuses_before_it_reads_anything(base, data, tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "measure_free_bytes", lambda _: 1000)
    options = PruneConfig(steps=1, batch_size=2, micro_batch_size=2, seq_len=24, device="cpu")
    with pytest.raises(LpdeployError, match="ignore_memory=True"):
        prune(str(base), tmp_path / "run", data="nowhere.txt", options=options)
    assert not (tmp_path / "run").exists()
    options = dataclasses.replace(options, ignore_memory=True, round_to=4)
    prune(str(base), tmp_path / "run", data=str(data), options=options)
    stage = json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"]["prune"]
    planned = stage["planned_bytes"]
    assert planned["total"] == sum(v for name, v in planned.items() if name != "total")
    assert planned["weights"] > 0


def test_free_memory_of_this_machine_is_told():
    assert measure_free_bytes("cpu") > 1_000_000


def write_group(folder, limit):
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text("700\n")
    (folder / "memory.stat").write_text("anon 5\ninactive_file 99\nactive_file 1\n")
    return folder


def test_the_limit_of_a_container_counts(tmp_path, monkeypatch):
    group = write_group(tmp_path, 1000)
    assert measure_cgroup_bytes(group) == 400  # what files take is given back
    monkeypatch.setattr(fit, "_CGROUP", group)
    assert measure_free_bytes("cpu") == 400
    assert measure_cgroup_bytes(write_group(tmp_path, 500)) == 0


def test_without_a_limit_the_machine_decides(tmp_path):
    assert measure_cgroup_bytes(tmp_path / "missing") is None
    assert measure_cgroup_bytes(write_group(tmp_path, "max")) is None
