"""What `prune` refuses before it imports anything heavy."""

import json
import subprocess
import sys

from tests.cli.test_cli import SMALL, invoke
from tests.helpers import make_tiny_model

PROBE = """
import sys
from lpdeploy.cli.main import main
try:
    main(sys.argv[1:])
finally:
    print([name for name in ("torch", "transformers", "datasets") if name in sys.modules])
"""


def refuse(base, data, run, *words):
    command = [sys.executable, "-c", PROBE, "prune", base, "--data", data, "--output", run, *words]
    done = subprocess.run(
        [str(word) for word in command], check=False, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[-1] == "[]", "a heavy library was imported"
    (line,) = done.stderr.splitlines()
    return line


def test_names_are_checked_first(base, data, tmp_path):
    run = tmp_path / "run"
    assert "There is no folder './base'" in refuse("./base", data, run)
    assert "No file, folder or data set is called 'text'" in refuse(base, "text", run)
    assert "called 'valid'" in refuse(base, data, run, "--valid", "valid")
    assert "--eval-every belongs to --valid" in refuse(base, data, run, "--eval-every", "2")
    (tmp_path / "text.csv").write_text("a,b")
    assert "'.csv', which is not read" in refuse(base, tmp_path / "text.csv", run)
    assert not run.exists()


def test_so_is_the_output(base, data, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "plan.json").write_text("{}")
    assert "lpdeploy did not make this folder" in refuse(base, data, run)
    (base / "model.safetensors").unlink()
    assert "no *.safetensors weights" in refuse(base, data, tmp_path / "other")


def test_the_first_line_says_what_is_loading(base, data, tmp_path):
    words = ("prune", base, "--data", data, "--output", tmp_path / "a b", "--no-cache", *SMALL)
    result = invoke(*words)
    lines = result.stderr.splitlines()
    assert lines[0] == f"Loading '{base}'."
    assert f"Tokenizing '{data}'." in lines
    assert lines[-1] == f"Next: lpdeploy compact '{tmp_path}/a b'"  # which a shell takes


def test_each_stage_says_what_follows(data, tmp_path):
    base = make_tiny_model(tmp_path / "base", head_dim=16, heads=4, kv_heads=2)
    run = tmp_path / "run"
    invoke("prune", base, "--data", data, "--output", run, *SMALL)
    stages = {
        ("compact", run): f"Next: lpdeploy export {run} --engine ort",
        ("export", run, "--engine", "ort"): f"Next: lpdeploy verify {run} --engine ort",
        ("verify", run, "--engine", "ort"): f"Next: lpdeploy bench latency {run} --engine ort",
        ("eval", run, "--perplexity", data, "--seq-len", "32"): f"Next: lpdeploy report {run}",
    }
    for words, expected in stages.items():
        result = invoke(*words)
        assert result.exit_code == 0, result.stderr
        assert result.stderr.splitlines()[-1] == expected
        program = invoke(*words, "--json")
        json.loads(program.stdout)
        assert "Next:" not in program.stderr  # it knows
