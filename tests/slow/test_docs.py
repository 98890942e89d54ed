"""The commands that the documents show: all of them parse, and the tutorial runs as it stands."""

import contextlib
import re
import shlex
from importlib import resources
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from lpdeploy.cli.common import CONTEXT_SETTINGS
from lpdeploy.cli.main import main
from tests.helpers import ROOT
from tools.doc_commands import list_blocks, list_commands

DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
ASSETS = Path(str(resources.files("lpdeploy.demo"))) / "assets"

COMMANDS = [
    pytest.param(words, id=f"{document.stem}: {' '.join(words)}"[:90])
    for document in DOCUMENTS
    for words in list_commands(document)
]


def find_command(words):
    """Follow groups down to the command that takes the options."""
    command, name = main, "lpdeploy"
    while isinstance(command, click.Group):
        name, *words = words
        command = command.get_command(click.Context(command), name)
        assert command is not None, f"there is no command '{name}'"
    return command, words


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_parses(words):
    """Every option is there, takes such a value, and nothing that it needs is missing."""
    command, rest = find_command(words)
    # click remembers the names of the help option with the command.
    context = click.Context(command, info_name=command.name, **CONTEXT_SETTINGS)
    given, left, _ = command.make_parser(context).parse_args(list(rest))
    assert not left
    for param in command.get_params(context):
        value = given.get(param.name)
        if param.required:
            assert value, f"{param.name} is missing"
        if isinstance(param.type, click.Path) or value is None or param.is_eager:
            continue  # whether a path exists depends on where it is typed
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, str):
                param.type.convert(each, param, context)


def test_there_are_commands_to_check():
    assert len(COMMANDS) > 60


def test_the_tutorial_runs(tmp_path):
    """On the demo's model, in fewer steps; it has four layers, of which one goes."""
    smaller = {
        "HuggingFaceTB/SmolLM2-135M-Instruct": str(ASSETS / "story-llama-1M"),
        "--drop-layers 6": "--drop-layers 1",
        "--steps 40": "--steps 4",
        "--repeats 10": "--repeats 2",
    }
    document = ROOT / "docs" / "tutorial.md"
    text = document.read_text()
    assert all(name in text for name in smaller)
    with contextlib.chdir(tmp_path):
        for language, block in list_blocks(document):
            if language == "python":
                exec(compile(block, str(document), "exec"), {})
        for words in list_commands(document):
            line = shlex.join(words)
            for name, other in smaller.items():
                line = line.replace(name, other)
            if words[0] == "doctor":
                continue  # which says what this machine lacks
            result = CliRunner().invoke(main, shlex.split(line))
            assert result.exit_code == 0, f"{line}\n{result.output}"
        assert Path("run/report.html").is_file()
        assert Path("served-genai/README.md").is_file()


def test_the_site_builds_and_every_link_leads_somewhere(tmp_path, monkeypatch):
    pytest.importorskip("mkdocs")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    page = (tmp_path / "tutorial" / "index.html").read_text()
    assert "smaller chat model" in page
    loaded = re.findall(r'(?:src|href)="(https?://[^"]+\.(?:js|css|woff2?))"', page)
    assert loaded == [], "the page loads something from elsewhere"
