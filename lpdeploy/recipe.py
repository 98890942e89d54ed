"""Recipes: YAML files that hold the options of commands."""

import difflib
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from lpdeploy.errors import RecipeError

logger = logging.getLogger(__name__)


def load_recipe(
    path: Path,
    command: str,
    *,
    known: Collection[str],
    former: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Read the options of one command from a recipe.

    Args:
        path: YAML file with one top-level key a command.
        command: Whose options to read, ``prune`` say.
        known: Names of its options, with underscores.
        former: Former names of some of them, which are still read -> their names.

    Returns:
        Option name -> value; empty where the recipe does not speak of the command.

    Raises:
        RecipeError: The file is no YAML mapping, or names an unknown option, or gives an option
            under both its names.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"Recipe '{path}' cannot be read: {reason}.") from error
    if not isinstance(data, dict) or not all(isinstance(v, dict) for v in data.values()):
        raise RecipeError(
            f"Recipe '{path}' must map commands to options, for example 'prune: {{ratio: 0.5}}'."
        )
    options = _rename(path, data.get(command, {}), former)
    unknown = sorted(set(options) - set(known))
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise RecipeError(
            f"Recipe '{path}' gives '{command}' an unknown option '{unknown[0]}'.{hint} "
            f"It knows {', '.join(sorted(known))}."
        )
    return options


def _rename(path: Path, options: dict[str, Any], former: Mapping[str, str]) -> dict[str, Any]:
    for old in former.keys() & options.keys():
        if former[old] in options:
            raise RecipeError(
                f"Recipe '{path}' gives '{former[old]}' and its former name '{old}'. Keep one."
            )
        if options[old] is not None:
            logger.warning(
                "'%s' in recipe '%s' is now called '%s'; it still works.", old, path, former[old]
            )
    return {former.get(name, name): value for name, value in options.items()}
