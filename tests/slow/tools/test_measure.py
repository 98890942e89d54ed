"""The tools behind docs/costs.md and docs/scaling.md run in small, and give their tables."""

import json
import shutil
import subprocess
import sys

import pytest

from lpdeploy.machine import describe_machine
from tests.helpers import ROOT, make_text, make_tiny_model
from tools import doc_tables
from tools.measure import stages


def run(tool, *words):
    done = subprocess.run(
        [sys.executable, "-m", f"tools.measure.{tool}", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_memory_is_measured_and_planned_anew(tmp_path):
    path = tmp_path / "memory.json"
    run("memory", "--size", "tiny", "--output", path)
    document = json.loads(path.read_text())
    (row,) = document["rows"]
    assert row["error"] == row["planned_bytes"]["total"] / row["measured_bytes"] - 1
    row["planned_bytes"] = {}
    path.write_text(json.dumps(document))
    assert "largest error" in run("memory", "--replan", "--output", path)
    assert json.loads(path.read_text())["rows"][0]["planned_bytes"]["weights"] > 0
    assert "| tiny | seq len 16 |" in doc_tables.render_memory(document | {"rows": [
        json.loads(path.read_text())["rows"][0]]})  # fmt: skip


def test_a_run_that_cuts_and_one_that_masks(tmp_path):
    model = make_tiny_model(tmp_path / "m", num_hidden_layers=1)
    data, path = make_text(tmp_path / "t.txt"), tmp_path / "run.json"
    run(
        "pruning", model, "--data", data, "--valid", data, "--output", path,
        "--steps", 8, "--prune-every", 2, "--batch-size", 2, "--seq-len", 16, "--device", "cpu",
    )  # fmt: skip
    document = json.loads(path.read_text())
    cut, mask = (document["runs"][name] for name in ("cut", "mask"))
    for one in (cut, mask):
        assert len(one["steps"]) == 8
        parts = one["training_s"] + one["scoring_s"] + one["cutting_s"]
        assert one["seconds"] == pytest.approx(parts)
        assert one["steps"][-1]["ratio"] == 0.5
    assert document["cut_over_mask"] == cut["seconds"] / mask["seconds"]
    assert path.with_suffix(".svg").read_text().startswith("<?xml")
    assert "| mask |" in doc_tables.render_run(document)


def test_large_models_are_planned_without_any_device(tmp_path):
    path = tmp_path / "plan.json"
    run("scaling", "--output", path)
    document = json.loads(path.read_text())
    assert "nothing here was measured" in document["computed"]
    by_case = {
        (r["model"], r["gpus"], r["sharded"], r["load_in"]): r for r in document["rows"]
    }  # the last of those that differ in checkpointing
    one = by_case["LLaMA-65B", 1, False, "8bit"]
    # 80 layers of 4 x 8192^2 + 3 x 8192 x 22016 weights; embeddings and head in 2 bytes.
    assert one["bytes"]["weights"] == pytest.approx(
        80 * (4 * 8192**2 + 3 * 8192 * 22016) + 2 * 2 * 32000 * 8192, rel=1e-3
    )
    assert one["fits"]
    assert not by_case["LLaMA-65B", 1, False, None]["fits"]
    sharded = by_case["LLaMA-65B", 8, True, None]["bytes"]["weights"]
    whole = by_case["LLaMA-65B", 1, False, None]["bytes"]["weights"]
    assert whole / 8 < sharded < whole / 4
    assert "| LLaMA-65B | 8 | bf16, sharded |" in doc_tables.render_scaling(document)


def test_a_stage_is_measured_as_a_process_of_its_own(tmp_path):
    base = make_tiny_model(tmp_path / "base")
    commands = stages.list_stages(tmp_path)
    measured = stages.measure_stage(commands["check"], tmp_path)
    assert measured["seconds"] > 0
    assert measured["bytes"] == 0  # check writes nothing
    assert 50e6 < measured["peak_bytes"] < 5e9
    written = stages.measure_stage(["export", base, "--engine", "onnx"], tmp_path)
    assert written["bytes"] == stages.count_bytes(tmp_path / "base" / "onnx") > 0
    document = {"parameters": 1, "layers": 1, "bytes": 1, "stages": {"check": measured}}
    machine = {**describe_machine().to_json(), "command": "python"}
    table = doc_tables.render_stages({**document, "machine": machine})
    assert f"| check | {measured['seconds']:,.0f} |" in table


def test_a_stage_that_fails_ends_the_measurement(tmp_path):
    with pytest.raises(SystemExit, match="compact failed"):
        stages.measure_stage(["compact", tmp_path / "nothing"], tmp_path)


def test_the_memory_of_a_refit_is_compared(tmp_path):
    base, data = make_tiny_model(tmp_path / "base", max_position_embeddings=256), tmp_path / "t.txt"
    make_text(data, documents=80, words=300)
    run("refit", base, "--train", data, "--memory", "--output", tmp_path / "x.json")
    document = json.loads((tmp_path / "x.json").read_text())
    assert document["ratio"] == document["refit"]["peak_bytes"] / document["plain"]["peak_bytes"]
    assert "| with a refit |" in doc_tables.render_refit_memory(document)


def test_answers_and_the_share_of_the_head(tmp_path):
    assets = ROOT / "lpdeploy" / "demo" / "assets" / "story-llama-1M"
    folders = [tmp_path / "dense", tmp_path / "small" / "model"]
    for folder in folders:
        shutil.copytree(assets, folder)
        (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    run("answers", *folders, "--tokens", 5, "--output", tmp_path / "x.json")
    document = json.loads((tmp_path / "x.json").read_text())
    dense, small = (document["models"][name] for name in ("dense", "small"))
    assert dense["answers"] == small["answers"]
    assert all(dense["answers"].values())
    assert dense["bytes"] == (assets / "model.safetensors").stat().st_size
    for phase in (dense["prefill"], dense["decode"]):
        assert 0 < phase["head_ms"] < phase["ms"]
        assert phase["head_share"] == pytest.approx(phase["head_ms"] / phase["ms"])
    table = doc_tables.render_answers(document)
    assert f"| small | {dense['parameters'] / 1e6:.1f} |" in table
    assert "| What is the capital of France? |" in table
