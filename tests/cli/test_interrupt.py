"""Ctrl-C ends a command with one sentence and 130, and leaves no process behind."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from lpdeploy.environment import ignore_interrupts
from lpdeploy.errors import RunEndedError
from tests.cli.test_cli import invoke
from tests.helpers import make_tiny_model

SENTENCE = "The command was interrupted."


@pytest.fixture
def interrupted(monkeypatch, tmp_path):
    """Let the library be interrupted while `compact` runs; return what to call."""

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("lpdeploy.models.compact.compact", stop)
    return lambda *words: invoke("compact", tmp_path, *words)


def test_an_interrupted_command_says_so_and_ends_with_130(interrupted):
    result = interrupted()
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr.split() == SENTENCE.split()


def test_with_json_it_is_an_error_too(interrupted):
    result = interrupted("--json")
    assert result.exit_code == 130
    error = {"type": "Interrupted", "message": SENTENCE}
    assert json.loads(result.stdout) == {"error": error}


def test_a_run_that_was_told_to_end_ends_with_130(monkeypatch, tmp_path):
    def stop(*_, **__):
        raise RunEndedError(f"{RunEndedError.SENTENCE} {RunEndedError.HINT}")

    monkeypatch.setattr("lpdeploy.models.compact.compact", stop)
    result = invoke("compact", tmp_path)
    assert result.exit_code == 130
    assert result.stderr == "Error: The run was told to end. Go on with --resume.\n"


@pytest.fixture(autouse=True)
def _heeded():
    """Heed Ctrl-C, which a job in the background is started to ignore, and so are its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)


def test_what_is_started_meanwhile_ignores_ctrl_c():
    show = "import signal; print(signal.getsignal(signal.SIGINT) == signal.SIG_IGN)"
    before = signal.getsignal(signal.SIGINT)
    with ignore_interrupts():
        inside = subprocess.run([sys.executable, "-c", show], capture_output=True, check=True)
    outside = subprocess.run([sys.executable, "-c", show], capture_output=True, check=True)
    assert (inside.stdout, outside.stdout) == (b"True\n", b"False\n")
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there are no process groups")
def test_the_processes_of_a_benchmark_end_with_it(tmp_path):
    """The terminal sends the signal to all of them at once."""
    model = make_tiny_model(tmp_path / "model", num_hidden_layers=1)
    words = (
        "bench",
        "latency",
        model,
        "--engine",
        "torch",
        "--tokens",
        "64",
        "--repeats",
        "9999999",
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "lpdeploy", *map(str, words), "--output", str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    children, deadline = [], time.monotonic() + 300
    while len(children) < 2:  # of the engine, and of the machine's limits
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the benchmark did not get there"
        time.sleep(0.1)
        started = psutil.Process(process.pid).children(recursive=True)
        children = [child for child in started if "spawn_main" in " ".join(child.cmdline())]
    os.killpg(process.pid, signal.SIGINT)
    output, said = process.communicate(timeout=120)
    assert (process.returncode, output) == (130, "")
    assert said.splitlines()[-1] == SENTENCE
    assert "Traceback" not in said
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
