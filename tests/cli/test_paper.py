"""`lpdeploy paper`: what it refuses, each with the sentence that tells the fix."""

import re

import pytest
from click.testing import CliRunner

from lpdeploy.cli.main import main
from lpdeploy.paper.run import CommandError, Commands
from lpdeploy.paper.tables import TABLES
from tests.helpers import make_text, make_tiny_model


@pytest.fixture
def ask(tmp_path, monkeypatch):
    monkeypatch.setattr(Commands, "call", lambda *_: pytest.fail("a cell was run"))
    base = make_tiny_model(tmp_path / "base")
    text = make_text(tmp_path / "text.txt")

    def run(table, *words, perplexity=True, model=base):
        evaluation = ["--perplexity", text, "--eval-seq-len", "32"] if perplexity else []
        given = ["paper", table, model, "--data", text, "--output", tmp_path / "out"]
        return CliRunner().invoke(main, [str(w) for w in [*given, *evaluation, *words]])

    return run


def test_the_help_names_every_table():
    result = CliRunner().invoke(main, ["paper", "--help"])
    about = result.stdout.split("Options:")[0]
    assert [name for name in TABLES if not re.search(rf"\b{name}\b", about)] == []


def test_a_table_may_be_called_a_table(ask):
    for name in ("4", "table-4"):
        assert "Table 4" in ask(name, "--jobs", "2").stderr


@pytest.mark.parametrize(
    ("table", "words", "sentence"),
    [
        ("7", ["--", "--step", "4"], "options of prune after '--': No such option '?--step"),
        (
            "7",
            ["--", "--lr", "x"],
            "options of prune after '--': .*'x' is neither a number nor auto",
        ),
        ("7", ["--", "--batch-size", "6"], "--batch-size 6 is no multiple of --micro-batch-size 4"),
        ("7", ["--", "extra"], "options of prune after '--': Got unexpected extra argument"),
        ("7", ["--", "--seed", "4"], "--seed is set by the cells of Table 7. Remove it"),
        ("7", ["--", "--schedule", "joint"], "--schedule is set by the cells of Table 7"),
        ("2", ["--", "--criterion=lora"], "--criterion is set by the cells of Table 2"),
        ("8", ["--", "--prune-every", "4"], "--prune-every is set by the cells of Table 8"),
        ("7", ["--", "--output", "x"], "--output is set by the cells of Table 7"),
        ("7", ["--", "--json"], "--json is set by the cells of Table 7"),
        ("7", ["--steps", "4"], "--steps is an option of prune. Put it at the end, after '--'"),
        ("recipe", ["--rows", "fast", "--", "--refit-samples", "9"], "-samples belongs to --refit"),
        (
            "5",
            ["--", "--drop-layers", "1"],
            "chooses what --drop-layers says; give one of them. Row 'recipe' says so; --rows",
        ),
        ("7", ["--ratios", "0.2,1.5"], "1.5 is not in the range"),
        ("7", ["--task-data", "."], "--task-data needs --tasks NAMES"),
        ("7", ["--limit", "3"], "--limit needs --tasks NAMES"),
        ("3", [], "'3' is not one of"),
    ],
)
def test_wrong_usage(ask, table, words, sentence):
    result = ask(table, *words)
    assert result.exit_code == 2, result.output
    assert re.search(sentence, " ".join(result.stderr.split())), result.stderr


def test_an_option_may_need_one_that_the_rows_set(ask, monkeypatch):
    run = []

    def call(_, words):
        run.append(words)
        raise CommandError("enough", killed=False)

    monkeypatch.setattr(Commands, "call", call)
    words = ["--seeds", "1", "--ratios", "0.5", "--rows", "all"]
    result = ask("recipe", *words, "--", "--refit-samples", "9", "--steps", "4")
    assert "enough" in result.stderr
    assert run[0][0] == "prune"
    assert {"--refit", "--refit-samples"} <= set(run[0])


@pytest.mark.parametrize(
    ("table", "words", "sentence"),
    [
        ("4", ["--jobs", "2"], "--jobs 2: Table 4 measures time .* Leave --jobs out"),
        ("figure-6", [], "Give --steps N among the options of prune, after '--'"),
        ("7", ["--rows", "lora"], "has no row 'lora'. Choose from joint, separate"),
    ],
)
def test_what_a_table_cannot_do(ask, table, words, sentence):
    result = ask(table, *words)
    assert result.exit_code == 2, result.output
    assert re.search(sentence, " ".join(result.stderr.split())), result.stderr


def test_a_table_with_nothing_to_show_is_refused(ask):
    result = ask("7", perplexity=False)
    assert result.exit_code == 2
    assert "Table 7 has nothing to show. Give --perplexity SOURCE, --tasks NAMES" in result.stderr


def test_two_texts_of_one_name_are_refused(ask, tmp_path):
    (tmp_path / "b").mkdir()
    other = make_text(tmp_path / "b" / "text.txt")
    result = ask("7", "--perplexity", other)
    assert result.exit_code == 2
    assert "Two of --perplexity are called 'text.txt'. Rename one" in result.stderr


def test_a_folder_of_other_things_is_left_alone(ask, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    result = ask("7")
    assert result.exit_code == 1
    assert re.search("holds notes.txt, and no cells of tables. Use an empty", result.stderr)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_a_model_that_is_none_is_refused(ask, tmp_path):
    result = ask("7", model=tmp_path)
    assert result.exit_code == 1
    assert "is no Hugging Face model" in result.stderr


def test_a_recipe_gives_options_but_cells_win(ask, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("prune: {offload_gradients: true, criterion: gradient}\n")
    result = ask("6", "--", "--recipe", recipe)
    assert result.exit_code == 2
    assert "The recipe sets offload_gradients, which only some cells of Table 6" in result.stderr
    for table, setting in (("refit", "refit: true"), ("5", "distill: 0.5"), ("7", "preset: best")):
        recipe.write_text(f"prune: {{{setting}}}\n")
        result = ask(table, "--", "--recipe", recipe)
        assert result.exit_code == 2
        name = setting.partition(":")[0]
        assert re.search(
            rf"The recipe (sets {name}, which only some|names a {name})", result.stderr
        )
    recipe.write_text("prune: {stepz: 4}\n")
    result = ask("6", "--", "--recipe", recipe)
    assert result.exit_code == 2
    assert "unknown option 'stepz'. Did you mean 'steps'?" in result.stderr
