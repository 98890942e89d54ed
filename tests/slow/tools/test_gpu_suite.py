"""What is for a machine with a GPU runs in small on a CPU, and keeps its results."""

import json
import os
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
    eager = [row for row in rows if row["engine"] == "torch"]
    found = {(row["model"], row["ratio"], row["merged"]) for row in eager}
    models = {
        ("4 heads, 100 channels", 0.0),
        ("3 heads, 96 channels", 0.2),  # 80 channels, to the nearer multiple of 32, a tie up
        ("3 heads, 80 channels", 0.2),
        ("2 heads, 64 channels", 0.5),
        ("2 heads, 50 channels", 0.5),
    }
    assert found == {(*model, merged) for model in models for merged in (True, False)}
    assert all(row["limit_share"] > 0 and row["relative"] > 0 for row in rows)


def test_rounded_shapes_also_run_compiled_and_as_graphs(document):
    rows = document["parts"]["table-3"]["rows"]
    for engine in ("torch-compile", "torch-graph"):
        found = {(row["ratio"], row["merged"]) for row in rows if row["engine"] == engine}
        assert found == {(ratio, merged) for ratio in (0.0, 0.2, 0.5) for merged in (True, False)}


def test_faster_ways_give_the_logits_of_the_eager_model(document):
    parity = document["parts"]["table-3"]["parity"]
    assert len(parity) == 6
    for entry in parity:
        assert entry["max_abs_diff"].keys() == {"graph prefill", "compiled prefill", "decode"}
        # float32, two layers: the same sums in another order.
        assert max(entry["max_abs_diff"].values()) < 1e-5 * max(1, entry["max_abs_logit"])


def test_decoding_is_timed_at_both_batches(document):
    rows = document["parts"]["decode"]["rows"]
    found = {(row["engine"], row["batch"], row["merged"]) for row in rows}
    assert found == {
        *(("torch", 1, merged) for merged in (True, False)),
        *(("torch-graph", 1, merged) for merged in (True, False)),
        ("torch-compile", 1, True),
        ("torch", 8, True),
        ("torch-graph", 8, True),
    }
    assert {row["phase"] for row in rows} == {"decode"}


def test_a_large_model_is_extrapolated_from_two_depths(document):
    part = document["parts"]["pruning-65b"]
    (one,), (two,) = (entry["rows"] for entry in part["parts"])
    assert part["extrapolated"]["layers"] == 2
    assert part["extrapolated"]["weight_bytes"] == two["weight_bytes"] > one["weight_bytes"]


def test_the_smoke_test_compares_with_the_cpu(tmp_path):
    checks = ("criterion lora", "resume", "verify", "logits", "generation", "perplexity")
    done = subprocess.run(
        [sys.executable, "-m", "tools.gpu.smoke", "--device", "cpu", *checks,
         "--output", tmp_path / "smoke.json"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "smoke.json").read_text())["checks"]
    assert list(found) == list(checks)
    assert found["criterion lora"]["same_groups"] == found["resume"]["same_groups"] == 1
    assert found["verify"]["ok"]
    assert found["logits"]["max_abs_diff"] == 0
    assert found["generation"]["equal"]
    assert found["perplexity"]["here"] == found["perplexity"]["cpu"]


def test_an_unknown_part_is_refused(tmp_path):
    done = subprocess.run(
        ["bash", ROOT / "tools/gpu/run.sh", "tables", tmp_path],
        env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (2, "There is no part 'tables'.\n")


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
    whole = part["parts"][1]  # as many layers as a tiny model has
    assert whole["workload"]["gradient_checkpointing"]
    assert whole["rows"][0]["load_in"] == "8bit"
    assert part["planned_bytes"]["weights"] == whole["rows"][0]["weight_bytes"]
