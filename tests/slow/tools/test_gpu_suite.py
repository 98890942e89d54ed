"""The suite for a machine with a GPU runs in small on a CPU, and keeps its results."""

import json
import subprocess
import sys

import pytest

from tests.helpers import ROOT

PARTS = ("table-3", "decode", "ort", "trt", "pruning", "pruning-offload", "pruning-65b")


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    path = tmp_path_factory.mktemp("suite") / "gpu.json"
    path.write_text('{"parts": {"earlier": {"rows": []}}}')
    words = [*PARTS, "--size", "tiny", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "tools.gpu.suite", *words, "--output", path],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(path.read_text())


def test_every_shape_is_timed_merged_and_unmerged(document):
    rows = document["parts"]["table-3"]["rows"]
    found = {(row["model"], row["ratio"], row["merged"]) for row in rows}
    models = {
        ("4 heads, 100 channels", 0.0),
        ("3 heads, 96 channels", 0.2),  # 80 channels, to the nearer multiple of 32, a tie up
        ("3 heads, 80 channels", 0.2),
        ("2 heads, 64 channels", 0.5),
        ("2 heads, 50 channels", 0.5),
    }
    assert found == {(*model, merged) for model in models for merged in (True, False)}
    assert all(row["limit_share"] > 0 and row["relative"] > 0 for row in rows)


def test_decoding_is_timed_at_both_batches(document):
    rows = document["parts"]["decode"]["rows"]
    assert {(r["phase"], r["batch"]) for r in rows} >= {("decode", 1), ("decode", 8)}


def test_an_engine_is_compared_before_it_is_timed(document):
    part = document["parts"]["ort"]
    assert [entry["ratio"] for entry in part["parity"]] == [0.0, 0.5]
    for entry in part["parity"]:
        assert entry["max_abs_diff"] < 1e-5 * max(1, entry["max_abs_logit"])
        assert entry["top1_agreement"] == 1
    assert {row["engine"] for row in part["rows"]} == {"torch", "ort"}


def test_what_cannot_run_says_so_and_earlier_parts_stay(document):
    assert "NVIDIA GPU" in document["parts"]["trt"]["skipped"]
    assert document["parts"]["earlier"] == {"rows": []}
    assert document["parts"]["ort"]["machine"]["versions"]["torch"]


def test_pruning_is_measured_by_criterion_at_both_micro_batches(document):
    part = document["parts"]["pruning"]
    assert "failed" not in part
    for result in (part, part["micro_batch_1"]):
        found = [(row["criterion"], row["load_in"]) for row in result["rows"]]
        assert found == [
            ("lora", None), ("gradient", None), ("magnitude", None), ("lora", "8bit"),
        ]  # fmt: skip
        assert all(row["relative_time"] > 0 and row["peak_bytes"] for row in result["rows"])
    assert part["workload"]["micro_batch_size"] == 4  # all of a tiny batch fits
    assert part["micro_batch_1"]["workload"]["micro_batch_size"] == 1


def test_off_loading_and_65b_are_parts_of_their_own(document):
    rows = document["parts"]["pruning-offload"]["rows"]
    assert [row["offload_gradients"] for row in rows] == [False, True]
    part = document["parts"]["pruning-65b"]
    assert part["workload"]["gradient_checkpointing"]
    assert part["rows"][0]["load_in"] == "8bit"
    assert part["planned_bytes"]["weights"] == part["rows"][0]["weight_bytes"]
