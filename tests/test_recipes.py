"""The recipes in recipes/: the commands that a recipe has options for accept it."""

import importlib
from pathlib import Path

import click
import yaml

from lpdeploy.cli.main import main
from lpdeploy.cli.options import build_config
from lpdeploy.config import PruneConfig
from lpdeploy.fields import RENAMED

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
ARGUMENTS = {
    "prune": ["MODEL", "--data", "text.txt", "--output", "run"],
    "eval": ["run"],
}


def parse(command, recipe):
    """Return the options of a command as click makes them of a recipe, without running it."""
    module = importlib.import_module(f"lpdeploy.cli.{command}")
    # The settings of the real group: click caches the help option of the first context.
    root = click.Context(main, info_name="lpdeploy", **main.context_settings)
    arguments = [*ARGUMENTS[command], "--recipe", str(recipe)]
    return module.command.make_context(command, arguments, parent=root).params


def test_the_commands_of_a_recipe_take_it():
    fields = PruneConfig.__dataclass_fields__
    for recipe in RECIPES:
        content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
        assert content.keys() <= ARGUMENTS.keys(), recipe.name
        assert not content["prune"].keys() & RENAMED.keys(), recipe.name
        params = parse("prune", recipe)
        options = build_config({name: params[name] for name in fields})
        for name, value in content["prune"].items():
            if name in fields:
                assert getattr(options, name) == value, f"{recipe.name}: {name}"
        if "eval" in content:
            params = parse("eval", recipe)
            assert list(params["perplexity"]) == content["eval"]["perplexity"], recipe.name


def test_a_recipe_opens_with_the_command_that_runs_it():
    for recipe in RECIPES:
        head = recipe.read_text(encoding="utf-8").split("\nprune:")[0]
        assert all(line.startswith("#") for line in head.splitlines()), recipe.name
        assert "#   lpdeploy prune " in head, recipe.name
        assert f"--recipe recipes/{recipe.name}" in head, recipe.name
