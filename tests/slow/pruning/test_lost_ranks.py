"""A rank that is killed ends the run, promptly and with a word; nothing is lost, and it goes on."""

import json
import os
import shutil
import signal
import subprocess
import time

import pytest
from safetensors.torch import load_file

from lpdeploy.config import PruneConfig
from lpdeploy.pruning.run import prune
from lpdeploy.run_folder import RunFolder
from tests.slow.pruning.launching import (
    ACCELERATE,
    SECONDS,
    TORCHRUN,
    finish,
    list_ranks,
    start,
    start_without_launcher,
)

STEPS = 60


def prune_command(root, output):
    return [
        "lpdeploy", "prune", root / "base", "--data", root / "text.txt", "--output", output,
        "--steps", STEPS, "--batch-size", 8, "--micro-batch-size", 2, "--seq-len", 24,
        "--round-to", 4, "--device", "cpu", "--ramp", "authors", "--prune-every", 10,
        "--removal", "mask", "--lora-dropout", 0, "--checkpoint-every", 0,
    ]  # fmt: skip


def prune_alone(root, output, **arguments):
    options = PruneConfig(
        steps=STEPS, batch_size=8, micro_batch_size=2, seq_len=24, round_to=4, device="cpu",
        ramp="authors", removal="mask", lora_dropout=0.0, checkpoint_every=0,
    )  # fmt: skip
    data = str(root / "text.txt")
    prune(str(root / "base"), output, data=data, options=options, **arguments)
    return json.loads((output / "plan.json").read_text())["kept"]


def count_lines(log):
    return log.read_text().count("\n") if log.exists() else 0


def break_off(processes, output, *, lines, end):
    """Let a run log some lines, end it, check what it leaves, and return what it said."""
    log = output / "log.jsonl"
    wanted, deadline = count_lines(log) + lines, time.monotonic() + SECONDS
    try:
        while count_lines(log) < wanted:
            assert all(process.poll() is None for process in processes), "the run ended by itself"
            assert time.monotonic() < deadline, "the run did not get there"
            time.sleep(0.01)
        end(processes)
    finally:
        errors = "".join(finish(process)[1] for process in processes)
    assert {process.returncode for process in processes} <= {1, -signal.SIGKILL}
    files = (path.name for path in output.rglob("*") if path.is_file())
    names = sorted(name for name in files if not name.startswith("."))
    assert names == ["log.jsonl", "recipe.yaml", "state.safetensors"]
    load_file(output / "checkpoint" / "state.safetensors")
    (sentence,) = [line for line in errors.splitlines() if line.startswith("Error: ")]
    kept = f"The state after step {count_lines(log)} is kept in '{RunFolder(output).checkpoint}'."
    assert kept in sentence
    return sentence.replace(kept, "KEPT")


@pytest.mark.usefixtures("base", "data")
def test_a_run_that_is_broken_off_again_and_again(tmp_path):
    """Kill a rank; go on and kill the rank that writes; then end it in two ways."""
    output = tmp_path / "run"
    command = prune_command(tmp_path, output)
    launched = start(TORCHRUN, *command, stderr=subprocess.PIPE)

    def kill_last(processes):
        os.kill(list_ranks(processes[0])[1], signal.SIGKILL)

    assert break_off([launched], output, lines=12, end=kill_last) == (  # one event is past
        "Error: Rank 0 of 2 lost another rank, which was killed or has failed. KEPT "
        "Go on with --resume, with as many ranks as you like."
    )

    def kill_first(processes):
        processes[0].kill()

    ranks = start_without_launcher(*command, "--resume")
    assert break_off(ranks, output, lines=3, end=kill_first) == (
        "Error: Rank 1 of 2 lost another rank, which was killed or has failed. KEPT "
        "Go on with --resume, with as many ranks as you like."
    )
    shutil.copytree(output, tmp_path / "alone")
    # Through the command line to the end, in another way than it began: sharded.
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    launched = start(ACCELERATE, *command, "--resume", "--shard", "--json", **pipes)
    whole = prune_alone(tmp_path, tmp_path / "whole")
    assert prune_alone(tmp_path, tmp_path / "alone", resume=True) == whole
    answer, errors = finish(launched)
    assert launched.returncode == 0, errors
    assert errors.count("2 ranks on cpu, fp32, sharded") == 1
    assert errors.count(f"{output}: 50.0% of the heads") == 1
    assert json.loads(answer)["achieved"]["groups"] == 0.5
    assert json.loads((output / "plan.json").read_text())["kept"] == whole
    lines = (output / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))
