"""The prune stage: its files, what it refuses, and going on after a kill."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from lpdeploy.artifacts import compute_sha256
from lpdeploy.config import PruneConfig
from lpdeploy.errors import ArtifactError, DataError, LpdeployError, NonFiniteError
from lpdeploy.models.compact import compact
from lpdeploy.pruning.run import prune
from lpdeploy.run_folder import RunFolder
from tests.helpers import list_names

OPTIONS = {
    "ratio": 0.5, "steps": 8, "batch_size": 4, "micro_batch_size": 2, "seq_len": 24,
    "lr": 1e-2, "prune_every": 2, "ramp": "authors", "round_to": 4, "checkpoint_every": 3,
    "device": "cpu",
}  # fmt: skip


def run(base, output, data, *, options=None, **arguments):
    chosen = PruneConfig(**{**OPTIONS, **(options or {})})
    return prune(str(base), output, data=str(data), options=chosen, **arguments)


def load_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_run_holds_what_it_promises(base, data, tmp_path):
    result = run(base, tmp_path / "run", data)
    names = list_names(tmp_path / "run")
    assert names == [
        "adapter", "importance.safetensors", "log.jsonl", "manifest.json", "plan.json",
        "recipe.yaml",
    ]  # fmt: skip
    plan = RunFolder(tmp_path / "run").load_plan()
    assert {name: len(kept) for name, kept in plan.kept.items()} == {
        "layers.0.heads": 1, "layers.0.channels": 24, "layers.1.heads": 1, "layers.1.channels": 24,
    }  # fmt: skip
    assert result.achieved["groups"] == plan.achieved["groups"] == 0.5
    assert [line["step"] for line in load_log(tmp_path / "run")] == list(range(1, 9))
    scores = load_file(tmp_path / "run" / "importance.safetensors")
    assert scores["layers.0.channels"].shape == (48,)
    assert (scores["layers.0.channels"] > 0).all()


def test_what_stays_is_more_important_than_what_went_last(base, data, tmp_path):
    run(base, tmp_path / "run", data, options={"steps": 2, "prune_every": 1, "prune_warmup": 0.0})
    plan = RunFolder(tmp_path / "run").load_plan()
    scores = load_file(tmp_path / "run" / "importance.safetensors")["layers.0.channels"]
    kept = plan.kept["layers.0.channels"]
    gone = [index for index in range(48) if index not in kept]
    assert scores[kept].min() >= scores[gone].max()


@pytest.mark.parametrize(
    ("options", "zero"),
    [({}, "A"), ({"criterion": "gate"}, "B"), ({"lora_init": "peft"}, "B")],
    ids=str,
)
def test_lora_starts_as_the_options_say(base, data, tmp_path, options, zero):
    run(base, tmp_path / "run", data, options={"schedule": "one-shot", **options})
    weights = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    outputs = {name: weight for name, weight in weights.items() if "down_proj" in name}
    assert len(outputs) == 4
    for name, weight in outputs.items():
        assert bool(weight.any()) != (f"lora_{zero}" in name)
    assert not any(w.any() for name, w in weights.items() if "up_proj.lora_B" in name)


def test_protected_layers_stay_whole(base, data, tmp_path):
    run(base, tmp_path / "run", data, options={"protect_first": 1})
    kept = RunFolder(tmp_path / "run").load_plan().kept
    assert len(kept["layers.0.channels"]) == 48
    assert len(kept["layers.1.channels"]) == 24


def test_masking_and_cutting_give_the_same_plan(base, data, tmp_path):
    run(base, tmp_path / "cut", data, options={"lora_dropout": 0.0})
    run(base, tmp_path / "mask", data, options={"lora_dropout": 0.0, "removal": "mask"})
    assert (
        RunFolder(tmp_path / "cut").load_plan().kept
        == RunFolder(tmp_path / "mask").load_plan().kept
    )
    cut = load_file(tmp_path / "cut" / "adapter" / "adapter_model.safetensors")
    mask = load_file(tmp_path / "mask" / "adapter" / "adapter_model.safetensors")
    for name, tensor in cut.items():  # float32 sums in another order, amplified by AdamW
        torch.testing.assert_close(mask[name], tensor, rtol=1e-3, atol=1e-4)


def test_the_same_seed_gives_the_same_run(base, data, tmp_path):
    run(base, tmp_path / "a", data)
    run(base, tmp_path / "b", data)
    assert compute_sha256(tmp_path / "a" / "adapter") == compute_sha256(tmp_path / "b" / "adapter")


class StoppedError(Exception):
    """What a test interrupts a run with."""


def stop_after(step):
    def on_step(info):
        if info.step == step:
            raise StoppedError

    return on_step


ONCE = {"schedule": "separate", "calibration_samples": 6}


@pytest.mark.parametrize(
    ("options", "step"),
    [
        ({"removal": "cut"}, 4),
        ({"removal": "cut"}, 7),
        ({"removal": "mask"}, 4),
        ({"removal": "mask"}, 7),
        ({"criterion": "random"}, 4),
        ({"criterion": "gate", "calibration_samples": 6}, 2),  # after the calibration alone
        (ONCE | {"criterion": "gate"}, 2),
        (ONCE | {"criterion": "wanda", "removal": "mask"}, 2),
        (ONCE | {"criterion": "random"}, 4),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_a_resumed_run_ends_as_if_never_stopped(base, data, tmp_path, options, step):
    run(base, tmp_path / "whole", data, options=options)
    with pytest.raises(StoppedError):
        run(base, tmp_path / "run", data, options=options, on_step=stop_after(step))
    run(base, tmp_path / "run", data, options=options, resume=True)
    for name in ("adapter/adapter_model.safetensors", "importance.safetensors", "plan.json"):
        expected = (tmp_path / "whole" / name).read_bytes()
        assert (tmp_path / "run" / name).read_bytes() == expected
    first = 0 if "calibration_samples" in options else 1
    assert [line["step"] for line in load_log(tmp_path / "run")] == list(range(first, 9))


def test_off_loading_may_begin_when_a_run_goes_on(base, data, tmp_path):
    options = {"criterion": "gradient"}
    run(base, tmp_path / "whole", data, options=options)
    with pytest.raises(StoppedError):
        run(base, tmp_path / "run", data, options=options, on_step=stop_after(4))
    run(base, tmp_path / "run", data, options=options | {"offload_gradients": True}, resume=True)
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("schedule", ["separate", "one-shot"])
def test_pruning_at_once_comes_before_the_first_step(base, data, tmp_path, schedule):
    options = ONCE | {"schedule": schedule}
    result = run(base, tmp_path / "run", data, options=options)
    steps = 8 if schedule == "separate" else 0
    log = load_log(tmp_path / "run")
    assert [line["step"] for line in log] == list(range(steps + 1))
    assert [line["removed"] for line in log] == [True] + [False] * steps
    assert {line["ratio"] for line in log} == {0.5}
    plan = RunFolder(tmp_path / "run").load_plan()
    assert [len(kept) for kept in plan.kept.values()] == [1, 24, 1, 24]
    assert result.steps == steps
    # Where steps follow, their losses count, not that of the model that was still whole.
    losses = [line["loss"] for line in log[1:] or log]
    assert result.loss == pytest.approx(sum(losses) / len(losses))


def test_one_shot_compacts_to_rows_of_the_base(base, data, tmp_path):
    run(base, tmp_path / "run", data, options=ONCE | {"schedule": "one-shot"})
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    zero = {name: "A" if ".o_proj" in name or ".down_proj" in name else "B" for name in adapter}
    assert not any(t.any() for name, t in adapter.items() if f"lora_{zero[name]}" in name)
    compact(tmp_path / "run")
    whole = load_file(base / "model.safetensors")
    small = load_file(tmp_path / "run" / "model" / "model.safetensors")
    kept = RunFolder(tmp_path / "run").load_plan().kept
    for layer in range(2):
        prefix, channels = f"model.layers.{layer}", kept[f"layers.{layer}.channels"]
        name = f"{prefix}.mlp.up_proj.weight"
        assert torch.equal(small[name], whole[name][channels])
        name = f"{prefix}.mlp.down_proj.weight"
        assert torch.equal(small[name], whole[name][:, channels])
        (head,) = kept[f"layers.{layer}.heads"]  # one KV head of 8 rows, two query heads
        name = f"{prefix}.self_attn.k_proj.weight"
        assert torch.equal(small[name], whole[name][8 * head : 8 * head + 8])
        name = f"{prefix}.self_attn.q_proj.weight"
        assert torch.equal(small[name], whole[name][16 * head : 16 * head + 16])


@pytest.mark.parametrize("options", [{}, ONCE, ONCE | {"schedule": "joint"}])
def test_a_nan_before_any_step_is_not_blamed_on_the_rate(base, data, tmp_path, options):
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][:] = 1e38  # finite, and too large to compute with
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    step = 0 if options else 1
    sentence = (
        f"loss became (nan|inf) at step {step}. No step was done: check the model and the data"
    )
    with pytest.raises(NonFiniteError, match=sentence) as error:
        run(base, tmp_path / "run", data, options=options)
    assert "--lr" not in str(error.value)
    assert "--resume" not in str(error.value)
    # Only what was asked for: no checkpoint of nothing, no log, no half of a result.
    assert list_names(tmp_path / "run") == ["recipe.yaml"]


def test_a_nan_after_the_calibration_keeps_the_cut_model(base, data, tmp_path):
    options = ONCE | {"lr": 1e30, "lr_warmup": 0.0, "checkpoint_every": 0}
    with pytest.raises(NonFiniteError, match="The state after step 1 is kept"):
        run(base, tmp_path / "run", data, options=options)
    state = load_file(tmp_path / "run" / "checkpoint" / "state.safetensors")
    assert len(state["kept.layers.0.channels"]) == 24
    assert all(tensor.isfinite().all() for tensor in state.values())


@pytest.mark.slow
def test_a_killed_run_leaves_only_whole_files(base, data, tmp_path):
    """Kill at several moments; each time every file under a final name can be read whole."""
    command = [
        sys.executable, "-m", "lpdeploy", "prune", str(base), "--data", str(data),
        "--output", str(tmp_path / "run"), "--steps", "400", "--batch-size", "4",
        "--micro-batch-size", "4", "--seq-len", "24", "--checkpoint-every", "1",
        "--round-to", "4", "--device", "cpu",
    ]  # fmt: skip
    log = tmp_path / "run" / "log.jsonl"
    for steps in (2, 4):  # a checkpoint follows the line of its step
        extra = ["--resume"] if log.exists() else []
        process = subprocess.Popen([*command, *extra], stderr=subprocess.DEVNULL)
        wanted = steps + (len(log.read_text().splitlines()) if extra else 0)
        deadline = time.monotonic() + 120
        while not (log.exists() and log.read_text().count("\n") >= wanted):
            assert process.poll() is None, "the run ended by itself"
            assert time.monotonic() < deadline, "the run did not get there"
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        for line in log.read_text().splitlines():
            json.loads(line)
        load_file(tmp_path / "run" / "checkpoint" / "state.safetensors")
        assert not (tmp_path / "run" / "plan.json").exists()
        assert not (tmp_path / "run" / "adapter").exists()


def test_a_nan_keeps_the_last_good_state(base, data, tmp_path):
    with pytest.raises(NonFiniteError, match="at step .* is kept in .*state.safetensors") as error:
        # This rate moves the weights so far that the loss overflows.
        run(base, tmp_path / "run", data, options={"lr": 1e30, "lr_warmup": 0.0})
    assert "go on with `resume=True`" in str(error.value)
    state = load_file(tmp_path / "run" / "checkpoint" / "state.safetensors")
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert not (tmp_path / "run" / "plan.json").exists()


def test_an_existing_run_is_not_overwritten_unasked(base, data, tmp_path):
    run(base, tmp_path / "run", data)
    before = (tmp_path / "run" / "plan.json").read_bytes()
    with pytest.raises(ArtifactError, match="already holds a run"):
        run(base, tmp_path / "run", data)
    assert (tmp_path / "run" / "plan.json").read_bytes() == before
    (tmp_path / "run" / "notes.txt").write_text("mine")
    run(base, tmp_path / "run", data, overwrite=True, options={"seed": 1})
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "run" / "plan.json").read_bytes() != before


def test_a_sequence_longer_than_the_model_is_refused(base, data, tmp_path):
    with pytest.raises(LpdeployError, match="`seq_len` 500 is longer than the 128 positions"):
        run(base, tmp_path / "run", data, options={"seq_len": 500})
    assert not (tmp_path / "run").exists()


def test_protecting_every_layer_is_refused(base, data, tmp_path):
    with pytest.raises(LpdeployError, match="leave none of the 2 layers to prune"):
        run(base, tmp_path / "run", data, options={"protect_first": 1, "protect_last": 1})


def test_data_without_a_row_is_refused(base, tmp_path):
    (tmp_path / "short.txt").write_text("w1 w2")
    with pytest.raises(DataError, match="one row of `seq_len` 24"):
        run(base, tmp_path / "run", tmp_path / "short.txt")
    assert not (tmp_path / "run").exists()


def test_bad_input_does_not_cost_the_run_that_is_there(base, data, tmp_path):
    run(base, tmp_path / "run", data)
    (tmp_path / "short.txt").write_text("w1 w2")
    with pytest.raises(DataError):
        run(base, tmp_path / "run", tmp_path / "short.txt", overwrite=True)
    assert RunFolder(tmp_path / "run").load_plan().ratio == 0.5


def test_a_per_layer_model_is_refused(base, data, tmp_path):
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "lpdeploy_llama", "layer_widths": [[2, 48], [1, 48]]}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="pruned to per-layer widths already"):
        run(base, tmp_path / "run", data)
