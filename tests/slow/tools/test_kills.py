"""A few of the kills that tools/measure/kills.py and stage_kills.py make hundreds of."""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers import ROOT


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_killed_runs_end_as_the_run_never_killed(tmp_path):
    """The script exits 1 where a file was half written, or a run ended with other bytes."""
    path = tmp_path / "kills.json"
    command = [sys.executable, "-m", "tools.measure.kills", "--kills", "4", "--output", path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(path.read_text())
    assert document["kills"] == sum(document["moments"].values()) == 4
    assert sum(document["runs"].values()) >= 1
    assert document["machine"]["versions"]["torch"]


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_killed_stages_leave_the_old_or_the_new_result(tmp_path):
    path = tmp_path / "kills.json"
    command = [sys.executable, "-m", "tools.measure.stage_kills", "--kills", "16"]
    done = subprocess.run(
        [*command, "--output", path], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(path.read_text())
    assert document["kills"] == sum(document["stages"].values()) >= 16
    assert sum(document["moments"].values()) == document["kills"]


@pytest.fixture
def script(monkeypatch):
    for name in ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM"):  # the script sets them
        monkeypatch.setenv(name, os.environ.get(name, "1"))
    from tools.measure import kills

    return kills


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("log.jsonl", '{"step": 1}\n{"st'),
        ("manifest.json", '{"stages"'),
        ("recipe.yaml", "prune"),
        ("importance.safetensors", "1234567"),
        ("adapter/adapter_config.json", "{}"),
    ],
)
def test_half_a_file_would_be_noticed(script, tmp_path, name, content):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    with pytest.raises(script.KillTestError, match="is not whole"):
        script.check_whole(tmp_path)


def test_what_has_no_final_name_may_be_half(script, tmp_path):
    (tmp_path / ".plan.json.tmp-1").write_text("{")
    (tmp_path / ".adapter.old-1").mkdir()
    (tmp_path / ".adapter.old-1" / "adapter_config.json").write_text("{")
    script.check_whole(tmp_path)
