"""What a shell completes, by click's own protocol, and how little is imported for it."""

import os
import shutil
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from lpdeploy.cli.main import main
from lpdeploy.cli.types import MODEL, SOURCE
from lpdeploy.criteria import CRITERIA
from lpdeploy.engines import ENGINES
from tests.cli.test_cli import COMMANDS
from tests.cli.test_common import list_params
from tests.test_layers import HEAVY

EVERY = (*(name for name in COMMANDS if name != "bench"), "bench latency", "bench pruning")
WITH_MODEL = sorted({*EVERY} - {"paper", "doctor", "demo"})


def complete(words):
    """Return what bash is told for the last of some words, which may be empty: (kind, value)."""
    env = {
        "_LPDEPLOY_COMPLETE": "bash_complete",
        "COMP_WORDS": f"lpdeploy {words}",
        "COMP_CWORD": str(len(f"{words}|".split())),
    }
    result = CliRunner().invoke(main, [], prog_name="lpdeploy", env=env)
    assert result.exit_code == 0, result.output
    return [tuple(line.split(",", 1)) for line in result.stdout.splitlines() if line]


def test_commands_and_options_are_completed():
    assert [value for _, value in complete("")] == COMMANDS
    assert complete("bench l") == [("plain", "latency")]
    assert complete("prune --ra") == [("plain", "--ratio"), ("plain", "--ramp")]
    assert ("plain", "--no-refit") in complete("prune --no-")


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        *((f"{command} mo", "dir") for command in WITH_MODEL),
        ("paper 2 mo", "dir"),
        ("bench latency run mo", "dir"),
        ("prune model --data mo", "file"),
        ("paper 2 model --data mo", "file"),
        ("bench pruning model --data mo", "file"),
        ("eval run --perplexity mo", "file"),
        ("eval run --task-data mo", "dir"),
        ("generate run --prompts mo", "file"),
        ("prune model --recipe mo", "file"),
        ("report run --output mo", "file"),
    ],
)  # fmt: skip
def test_paths_are_left_to_the_shell(words, kind):
    assert complete(words) == [(kind, "mo")]


def test_every_option_that_takes_a_path_or_a_name_is_completed():
    for param in list_params(main):
        if param.metavar == "SOURCE":
            assert param.type is SOURCE, param.name
        if param.name in ("model", "models") and not isinstance(param.type, click.Path):
            assert param.type is MODEL, param.name


def test_names_are_completed_also_in_a_list():
    assert [value for _, value in complete("prune model --criterion ")] == list(CRITERIA)
    assert [value for _, value in complete("eval run --engine ")] == list(ENGINES)
    assert complete("bench latency run --engine torch,on") == [("plain", "torch,onnx")]
    assert complete("bench latency run --batch 1,") == []


@pytest.fixture
def shell(tmp_path):
    """Have a command `lpdeploy` on the path; return the environment."""
    command = tmp_path / "bin" / "lpdeploy"
    command.parent.mkdir()
    code = "from lpdeploy.cli.main import main\nmain(prog_name='lpdeploy')\n"
    command.write_text(f"#!{sys.executable}\n{code}")
    command.chmod(0o755)
    path = os.pathsep.join((str(command.parent), os.environ["PATH"]))
    return {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_it(shell, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "modes.txt").touch()
    script = (
        'eval "$(_LPDEPLOY_COMPLETE=bash_source lpdeploy)" || exit 1\n'
        "compopt() { echo compopt $*; }\n"
        'COMP_WORDS=(lpdeploy compac); COMP_CWORD=1; _lpdeploy_completion lpdeploy\n'
        'echo "${COMPREPLY[@]}"\n'
        'COMP_WORDS=(lpdeploy eval mo); COMP_CWORD=2; _lpdeploy_completion lpdeploy\n'
    )  # fmt: skip
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        cwd=tmp_path, env=shell, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["compact", "compopt -o dirnames"]


def test_completing_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from click.shell_completion import BashComplete\n"
        "from lpdeploy.cli.main import main\n"
        "found = BashComplete(main, {}, 'lpdeploy', '_LPDEPLOY_COMPLETE').get_completions\n"
        f"for name in {EVERY}:\n"
        "    assert found(name.split(), '--'), name\n"
        f"print(*sorted({HEAVY} & {{name.split('.')[0] for name in sys.modules}}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("\n", "")
