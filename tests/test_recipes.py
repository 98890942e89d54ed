"""The recipes in recipes/: each is taken by the commands it has options for."""

import importlib
from pathlib import Path

import click
import pytest
import yaml

from lpdeploy.cli.options import build_config
from lpdeploy.config import RENAMED, PruneConfig

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
ARGUMENTS = {
    "prune": ["MODEL", "--data", "text.txt", "--output", "run"],
    "eval": ["run"],
}


def parse(command, recipe):
    """Return the options of a command as click makes them of a recipe, without running it."""
    module = importlib.import_module(f"lpdeploy.cli.{command}")
    root = click.Context(click.Group("lpdeploy"), info_name="lpdeploy")
    arguments = [*ARGUMENTS[command], "--recipe", str(recipe)]
    return module.command.make_context(command, arguments, parent=root).params


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_its_commands_take_it(recipe):
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    assert content.keys() <= ARGUMENTS.keys()
    assert not content["prune"].keys() & RENAMED.keys()
    fields = PruneConfig.__dataclass_fields__
    params = parse("prune", recipe)
    options = build_config({name: params[name] for name in fields})
    for name, value in content["prune"].items():
        if name in fields:
            assert getattr(options, name) == value
    if "eval" in content:
        params = parse("eval", recipe)
        assert list(params["perplexity"]) == content["eval"]["perplexity"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_it_opens_with_the_command_that_runs_it(recipe):
    head = recipe.read_text(encoding="utf-8").split("\nprune:")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert "#   lpdeploy prune " in head
    assert f"--recipe recipes/{recipe.name}" in head
