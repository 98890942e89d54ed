"""The heap of a run on a CPU: who decides, and that a restart is the same command."""

import os
import subprocess
import sys

import pytest

from lpdeploy.cli.main import main
from lpdeploy.pruning import heap

NAME = "GLIBC_TUNABLES"
OURS = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"

glibc = pytest.mark.skipif(not heap._can_tighten(), reason="needs glibc and no GPU")


@pytest.fixture(autouse=True)
def _untouched(monkeypatch):
    monkeypatch.delenv(NAME, raising=False)


@glibc
@pytest.mark.parametrize(
    ("before", "during"),
    [
        (None, OURS),
        ("glibc.malloc.hugetlb=1", f"glibc.malloc.hugetlb=1:{OURS}"),
        ("glibc.malloc.tcache_count=7", "glibc.malloc.tcache_count=7"),  # the user has decided
    ],
)
def test_processes_that_start_meanwhile_are_told(before, during, monkeypatch):
    if before:
        monkeypatch.setenv(NAME, before)
    with heap.tighten_heap():
        assert os.environ[NAME] == during
        assert heap.is_tight() == (OURS in during)
    assert os.environ.get(NAME) == before


def test_elsewhere_nothing_is_set(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with heap.tighten_heap():
        assert NAME not in os.environ
    heap.restart_tight()  # returns


@glibc
def test_a_restart_is_the_same_command_in_the_same_process():
    code = (
        "import os, sys; from lpdeploy.pruning.heap import is_tight, restart_tight\n"
        "print(os.getpid(), is_tight(), sys.argv[1:], flush=True); restart_tight()\n"
        "print('goes on')"
    )
    words = [sys.executable, "-c", code, "a b", "--c"]
    process = subprocess.run(words, capture_output=True, text=True, check=True)
    first, second, last = process.stdout.splitlines()
    number = first.split()[0]
    assert first == f"{number} False ['a b', '--c']"
    assert second == f"{number} True ['a b', '--c']"
    assert last == "goes on"


@pytest.mark.parametrize(
    ("argv", "args", "restarted"),
    [
        (["prune", "--help"], None, True),
        (["check", "--help"], None, False),
        (["prune", "--help"], ["prune", "--help"], False),  # called by a program
    ],
)
def test_only_prune_from_a_shell_restarts(argv, args, restarted, monkeypatch):
    calls = []
    monkeypatch.setattr("lpdeploy.cli.main.restart_tight", lambda: calls.append(1))
    monkeypatch.setattr(sys, "argv", ["lpdeploy", *argv])
    with pytest.raises(SystemExit):
        main.main(args)
    assert bool(calls) == restarted
