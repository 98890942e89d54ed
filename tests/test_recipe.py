from itertools import pairwise

import pytest

from lpdeploy.errors import RecipeError
from lpdeploy.recipe import load_recipe

COMMANDS = ("prune", "export", "eval")


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_reads_the_options_of_one_command(tmp_path):
    path = write(tmp_path, "prune: {ratio: 0.2}\nexport: {engine: onnx}\n")
    assert load_recipe(path, "prune", known=["ratio"], commands=COMMANDS) == {"ratio": 0.2}
    assert load_recipe(path, "eval", known=["seq_len"], commands=COMMANDS) == {}


def test_an_unknown_option_names_the_near_and_the_known(tmp_path):
    path = write(tmp_path, "prune: {ration: 0.2}\n")
    with pytest.raises(RecipeError, match="'ration'. Did you mean 'ratio'\\? It knows lr, ratio."):
        load_recipe(path, "prune", known=["ratio", "lr"], commands=COMMANDS)


@pytest.mark.parametrize("text", ["- a\n", "prune: 3\n", "just words\n"])
def test_what_is_no_mapping_is_refused(tmp_path, text):
    with pytest.raises(RecipeError, match="must map commands to options"):
        load_recipe(write(tmp_path, text), "prune", known=[], commands=COMMANDS)


def test_broken_yaml_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(write(tmp_path, "a: [1"), "prune", known=[], commands=COMMANDS)


BOMB = "prune:\n  a: &a [x]\n" + "".join(
    f"  {after}: &{after} [*{before}, *{before}]\n" for before, after in pairwise("abcdefghi")
)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("prnue: {ratio: 0.2}", "section 'prnue', which is no command. Did you mean 'prune'"),
        ("prune: {ratio: 0.2}\nprune: {ratio: 0.3}", "'prune' stands twice in one section"),
        ("prune: {ratio: 0.2, ratio: 0.3}", "'ratio' stands twice in one section"),
        (BOMB, "line 3 has an alias, which is not read"),
        ("prune: {ratio: {a: 1}}", "'ratio' of 'prune' has a value that no option can have"),
        ("prune: {ratio: [[1]]}", "'ratio' of 'prune' has a value that no option can have"),
        ("prune: {ratio: 2020-01-01}", "'ratio' of 'prune' has a value that no option can have"),
        ("prune: {ratio: !!binary YQ==}", "'ratio' of 'prune' has a value that no option can have"),
        ("prune: {ratio: " + "x" * 5000 + "}", "has a value that no option can have"),
        ("prune: {ratio: !!python/name:os.system }", "could not determine a constructor"),
        ("prune: {ratio: " + "9" * 5000 + "}", "cannot be read: .*4300 digits"),
        ("prune: {1: 2}", "must map commands to options"),
        ("1: {ratio: 2}", "must map commands to options"),
        ("? [a]\n: b", "cannot be read: .*unhashable key"),
        ("prune: " + "[" * 50_000, "nested too deeply"),
        ("# " + "x" * (1 << 20), "at most 1,048,576 are read"),
        ("", "must map commands to options"),
    ],
)
def test_what_no_one_writes_by_hand_is_refused(tmp_path, text, sentence):
    with pytest.raises(RecipeError, match=sentence):
        load_recipe(write(tmp_path, text), "prune", known=["ratio"], commands=COMMANDS)


def test_what_is_no_file_of_text_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="is not a regular file"):
        load_recipe(tmp_path, "prune", known=[], commands=COMMANDS)
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="is not UTF-8"):
        load_recipe(tmp_path / "recipe.yaml", "prune", known=[], commands=COMMANDS)
