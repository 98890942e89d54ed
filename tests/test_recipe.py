import pytest

from lpdeploy.errors import RecipeError
from lpdeploy.recipe import load_recipe


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_reads_the_options_of_one_command(tmp_path):
    path = write(tmp_path, "prune: {ratio: 0.2}\nexport: {engine: onnx}\n")
    assert load_recipe(path, "prune", known=["ratio"]) == {"ratio": 0.2}
    assert load_recipe(path, "eval", known=["seq_len"]) == {}


def test_an_unknown_option_names_the_near_and_the_known(tmp_path):
    path = write(tmp_path, "prune: {ration: 0.2}\n")
    with pytest.raises(RecipeError, match="'ration'. Did you mean 'ratio'\\? It knows lr, ratio."):
        load_recipe(path, "prune", known=["ratio", "lr"])


@pytest.mark.parametrize("text", ["- a\n", "prune: 3\n", "just words\n"])
def test_what_is_no_mapping_is_refused(tmp_path, text):
    with pytest.raises(RecipeError, match="must map commands to options"):
        load_recipe(write(tmp_path, text), "prune", known=[])


def test_broken_yaml_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(write(tmp_path, "a: [1"), "prune", known=[])
