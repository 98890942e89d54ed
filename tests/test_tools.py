"""Every tool starts, and none has grown out of its file."""

import importlib
import shutil
import subprocess
import sys

import pytest

from tests.helpers import ROOT

TOOLS = ROOT / "tools"
LARGEST_FILE = 400
# Libraries of other environments.
ELSEWHERE = {"triton_load"}


def list_modules():
    for room in ("measure", "gpu", "servers", "demo_model"):
        for path in sorted((TOOLS / room).glob("*.py")):
            if "def main(" in path.read_text(encoding="utf-8") and path.stem not in ELSEWHERE:
                yield f"tools.{room}.{path.stem}"


def test_every_tool_has_help(monkeypatch, capsys):
    for name in ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM"):  # the test of kills sets them
        monkeypatch.setenv(name, "1")
    modules = list(list_modules())
    assert len(modules) >= 12
    for name in modules:
        main = importlib.import_module(name).main
        monkeypatch.setattr(sys, "argv", [name, "--help"])
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code, name
        assert "usage" in capsys.readouterr().out.lower(), name


def test_dev_needs_the_standard_library_only():
    command = [sys.executable, "-S", "tools/dev.py", "--help"]  # -S: no site-packages
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "test --fast" in done.stdout


def test_files_stay_small():
    large = [p.name for p in TOOLS.rglob("*.py") if p.read_text().count("\n") > LARGEST_FILE]
    assert not large


def test_a_bare_copy_of_the_sources_runs(tmp_path):
    """Without being installed, as on a machine that only has the libraries."""
    shutil.copytree(ROOT / "lpdeploy", tmp_path / "lpdeploy")
    code = (
        "from lpdeploy.machine import list_versions\n"
        "import lpdeploy, sys; print(lpdeploy.__file__, list_versions()['lpdeploy'])"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(tmp_path / "lpdeploy" / "__init__.py"), "0.1.0"]
