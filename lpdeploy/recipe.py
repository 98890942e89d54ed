"""Recipes: YAML files that hold the options of commands.

A recipe may be a stranger's. Its YAML is the plain part that people write by hand: no aliases
(a few lines of them expand to gigabytes), no tags, no key twice, only values that an option can
have.
"""

import difflib
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from lpdeploy.errors import ArtifactError, RecipeError, quote_error
from lpdeploy.records import load_text

logger = logging.getLogger(__name__)

Scalar = str | bool | int | float | None
Value = Scalar | list[Scalar]

_MOST_CHARACTERS = 1 << 20
_LONGEST_VALUE = 4096


class _PlainLoader(yaml.SafeLoader):
    """Reads YAML without aliases and without the same key twice, of which the first would go."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.YAMLError(f"line {mark.line + 1} has an alias, which is not read")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002
        keys = [key.value for key, _ in node.value if isinstance(key.value, str)]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.YAMLError(f"'{twice:.40}' stands twice in one section")
        return super().construct_mapping(node, deep)


def load_recipe(
    path: Path,
    command: str,
    *,
    known: Collection[str],
    commands: Collection[str],
    former: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Value]:
    """Read the options of one command from a recipe.

    Args:
        path: YAML file with one top-level key a command.
        command: Whose options to read, ``prune`` say.
        known: Names of its options, with underscores.
        commands: Names of all commands that a recipe may have a section for.
        former: Former names of some options, which are still read -> their names.

    Returns:
        Option name -> a scalar or a list of scalars; empty where the recipe does not speak of the
        command.

    Raises:
        RecipeError: The file is no YAML mapping, or names an unknown command or option, or has a
            value that no option can have, or gives an option under both its names.
    """
    sections = load_sections(path)
    unknown = [name for name in sections if name not in commands]
    if unknown:
        raise RecipeError(
            f"Recipe '{path}' has a section '{unknown[0]:.40}', which is no command."
            f"{_suggest(unknown[0], commands)} The commands are {', '.join(sorted(commands))}."
        )
    options = _rename(path, sections.get(command, {}), former)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise RecipeError(
            f"Recipe '{path}' gives '{command}' an unknown option '{unknown[0]:.40}'."
            f"{_suggest(unknown[0], known)} It knows {', '.join(sorted(known))}."
        )
    return options


def load_sections(path: Path) -> dict[str, dict[str, Value]]:
    """Read a YAML file of sections with options.

    Raises:
        RecipeError: The file is no such YAML, or too large.
    """
    try:
        text = load_text(path, fix="Give a YAML file.")
        if len(text) > _MOST_CHARACTERS:
            raise RecipeError(
                f"Recipe '{path}' has {len(text):,} characters; at most {_MOST_CHARACTERS:,} are "
                "read. Give a file of options."
            )
        data = yaml.load(text, _PlainLoader)  # noqa: S506 - it is a SafeLoader
    except ArtifactError as error:
        raise RecipeError(f"Recipe {error}") from error
    except RecursionError:
        raise RecipeError(
            f"Recipe '{path}' is nested too deeply. Give sections of options."
        ) from None
    except (ValueError, yaml.YAMLError) as error:
        reason = getattr(error, "problem", None) or quote_error(error)  # a parser's, or another's
        raise RecipeError(f"Recipe '{path}' cannot be read: {reason}.") from error
    if not _is_mapping(data) or not all(map(_is_mapping, data.values())):
        raise RecipeError(
            f"Recipe '{path}' must map commands to options, for example 'prune: {{ratio: 0.5}}'."
        )
    for section, options in data.items():
        for name, value in options.items():
            if not _is_value(value):
                raise RecipeError(
                    f"In recipe '{path}', '{name:.40}' of '{section:.40}' has a value that no "
                    "option can have. Give text, a number, true or false, or a list of them."
                )
    return data


def _is_mapping(data: Any) -> bool:
    return isinstance(data, dict) and all(isinstance(key, str) for key in data)


def _is_value(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(
        v is None or (isinstance(v, str | bool | int | float) and len(str(v)) <= _LONGEST_VALUE)
        for v in values
    )


def _suggest(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean '{near[0]}'?" if near else ""


def _rename(path: Path, options: dict[str, Value], former: Mapping[str, str]) -> dict[str, Value]:
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
