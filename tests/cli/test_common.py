"""What all commands share."""

import ast
import json
import logging
import os
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from lpdeploy.cli.common import shared_options, show_log, write_flags
from lpdeploy.cli.main import main
from lpdeploy.cli.types import COUNT, Count, ListOf


@pytest.mark.parametrize(
    ("sentence", "written"),
    [
        ("`micro_batch_size` 3 does not divide", "--micro-batch-size 3 does not divide"),
        ("use `removal='mask'` or `round_to=4`", "use --removal mask or --round-to 4"),
        ("leave `shard=True` out", "leave --shard out"),
        ("the `model` has no config", "the MODEL has no config"),
        ("it's 'lpdeploy compact run'", "it's 'lpdeploy compact run'"),
    ],
)
def test_fields_become_options(sentence, written):
    assert write_flags(sentence) == written


@pytest.mark.parametrize("given", ["1, 8", [1, 8], ["1", "8"], (1, 8)])
def test_a_list_has_commas_or_is_one_in_a_recipe(given):
    assert ListOf(COUNT).convert(given, None, None) == (1, 8)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [(",", "',' is empty"), ([], r"\[\] is empty"), ("1,0", "0 is not in the range from 1 to")],
)
def test_a_list_checks_each_of_its_values(given, sentence):
    with pytest.raises(click.BadParameter, match=sentence):
        ListOf(COUNT).convert(given, None, None)


class OneCommand(type(main)):
    """lpdeploy's own group, with all that it does for an error, of one command."""

    def list_commands(self, _):
        return ["prune"]

    def get_command(self, _, cmd_name):
        return {"prune": command}.get(cmd_name)


def run(*words):
    return CliRunner().invoke(OneCommand("lpdeploy"), [str(word) for word in words])


@click.command()
@click.option("--steps", type=COUNT)
@click.option("--share", type=float)
@click.option("--again", is_flag=True)
@click.option("--keep/--no-keep", default=True)
@click.option("--text", multiple=True)
@click.option("--names", type=ListOf(click.INT))
@shared_options()
def command(*, as_json, **options):
    click.echo(repr(options))


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ("steps: 3", {"steps": 3}),
        ("share: 1e-3", {"share": 0.001}),
        ("share: 2", {"share": 2.0}),
        ("again: true", {"again": True}),
        ("keep: false", {"keep": False}),
        ("text: a.txt", {"text": ("a.txt",)}),
        ("text: [a.txt, b.txt]", {"text": ("a.txt", "b.txt")}),
        ("names: 3", {"names": (3,)}),
        ("names: [3, 4]", {"names": (3, 4)}),
        ("names: 3,4", {"names": (3, 4)}),
        ("steps: null", {}),
    ],
)
def test_a_recipe_gives_what_could_be_typed(options, found, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"prune: {{{options}}}".replace("3,4", "'3,4'"))
    result = run("prune", "--recipe", recipe)
    assert result.exit_code == 0, result.output
    nothing = {
        "steps": None, "share": None, "again": False, "keep": True, "text": (), "names": None,
    }  # fmt: skip
    assert ast.literal_eval(result.stdout) == nothing | found


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("steps: 1.5", "'1.5' is not a valid integer"),
        ("steps: true", "'true' is not a valid integer"),
        ("steps: 0", "0 is not in the range"),
        ("steps: [1, 2]", "The recipe gives --steps a list. Give one value."),
        ("steps: []", "The recipe gives --steps a list. Give one value."),
        ("share: yes", "'true' is not a valid float"),
        ("again: 3", "'3' is not a valid boolean"),
        ("keep: maybe", "'maybe' is not a valid boolean"),
        ("names: [a]", "'a' is not a valid integer"),
        ("names: 1.5", "'1.5' is not a valid integer"),
        ("names: []", "is empty"),
    ],
)
def test_a_recipe_gives_nothing_else(options, sentence, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"prune: {{{options}}}")
    result = run("prune", "--recipe", recipe)
    assert (result.exit_code, result.stdout) == (2, "")
    assert sentence in result.stderr


@pytest.mark.parametrize("started", ["lpdeploy", "python -m lpdeploy", "torchrun -m lpdeploy"])
@pytest.mark.parametrize("words", [("prune", "m"), ("bench", "latency", "m")])
def test_a_recipe_is_read_however_lpdeploy_was_started(tmp_path, started, words):
    (tmp_path / "recipe.yaml").write_text(f"{' '.join(words[:-1])}: {{bogus: 1}}")
    words = [*words, "--recipe", str(tmp_path / "recipe.yaml")]
    result = CliRunner().invoke(main, words, prog_name=started)
    assert result.exit_code == 2
    assert "an unknown option 'bogus'" in result.stderr


def test_a_recipe_may_have_the_sections_of_every_command(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    names = [name for name in main.list_commands(None) if name != "bench"]
    names += ["bench latency", "bench pruning"]
    recipe.write_text("".join(f"{name}: {{}}\n" for name in names))
    result = CliRunner().invoke(main, ["doctor", "--recipe", str(recipe)])
    assert "No such option" in result.stderr  # a command without options has no recipe
    result = CliRunner().invoke(main, ["compact", "nowhere", "--recipe", str(recipe)])
    assert "nowhere" in result.stderr


@pytest.mark.parametrize(
    ("words", "code", "kind", "sentence"),
    [
        (("compact", "nowhere"), 2, "UsageError", "Directory 'nowhere' does not exist."),
        (("compact", "--no-such"), 2, "UsageError", "No such option '--no-such'"),
        (("no-such",), 2, "UsageError", "No such command 'no-such'."),
        (("compact", "."), 1, "ArtifactError", "No plan.json in '.'. "),
        (("compact", ".", "--recipe", "bad.yaml"), 2, "UsageError", "Recipe 'bad.yaml' must map"),
    ],
)
def test_an_error_is_one_json_document_too(words, code, kind, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text("- 1")
    result = CliRunner().invoke(main, [*words, "--json"])
    assert result.exit_code == code
    (line,) = result.stdout.splitlines()
    error = json.loads(line)["error"]
    assert error["type"] == kind
    assert sentence in error["message"]
    assert error["message"] in result.stderr
    assert CliRunner().invoke(main, words).stdout == ""


def list_params(command):
    for name in getattr(command, "commands", {}) or (
        command.list_commands(None) if isinstance(command, click.Group) else ()
    ):
        yield from list_params(command.get_command(click.Context(command), name))
    yield from command.params


def test_every_whole_number_has_a_largest_value():
    params = list(list_params(main))
    counts = [param for param in params if isinstance(param.type, Count)]
    assert len(counts) > 40
    for param in params:
        assert not isinstance(param.type, (type(click.INT), click.IntRange)), param.name
    for param in counts:
        with pytest.raises(click.BadParameter, match="is not in the range from"):
            param.type.convert("1" + "0" * 30, param, None)


def test_the_list_of_commands_has_whole_sentences():
    for words in ([], ["bench"]):
        listed = CliRunner().invoke(main, [*words, "--help"]).stdout.split("Commands:")[1]
        assert "..." not in listed
        assert all(line.endswith(".") for line in listed.splitlines() if line)


def test_a_misspelt_command_gets_the_nearest_name():
    result = CliRunner().invoke(main, ["prun"])
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == "Error: No such command 'prun'. Did you mean 'prune'?"
    result = CliRunner().invoke(main, ["xyzzy"])
    assert result.stderr.splitlines()[-1] == "Error: No such command 'xyzzy'."


@pytest.mark.skipif(sys.platform == "win32", reason="pipes break differently")
def test_a_reader_that_has_seen_enough_is_no_error():
    """As `lpdeploy ... | head -1`: the pipe is closed before anything is written."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "lpdeploy", "doctor"],
        stdout=writer, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    os.close(writer)
    assert "Error" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_line_is_shown_once_whatever_handles_the_root_logger(capsys):
    """Some libraries call logging.basicConfig when they are imported."""
    root, other = logging.getLogger(), logging.StreamHandler()
    root.addHandler(other)
    try:
        with show_log():
            logging.getLogger("lpdeploy.models").info("once")
    finally:
        root.removeHandler(other)
    assert capsys.readouterr().err.splitlines() == ["once"]
