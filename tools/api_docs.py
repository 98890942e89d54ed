"""The reference of the Python API, docs/api.md, from docstrings."""

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

import lpdeploy
from lpdeploy.config import GROUPS
from lpdeploy.fields import get_option

_INTRODUCTION = """\
# Python API

`tools/update_docs.py` makes this page from the docstrings. Five short programs in
`examples/` show the API at work.

`import lpdeploy` loads no heavy library. Progress goes to the logger `lpdeploy`. What a user can
cause is an `lpdeploy.errors.LpdeployError`, and a wrong argument is a `ValueError`. Both name
fields in backticks.
"""


def render_api() -> str:
    """Return the reference as Markdown."""
    parts = [_INTRODUCTION]
    for name in ("prune", "Run", "compare", "PruneConfig", "LoRAPruner", "PruneCallback"):
        parts += _render(f"lpdeploy.{name}", getattr(lpdeploy, name))
    return "\n".join(parts)


def _render(name: str, thing: Any) -> Iterator[str]:
    yield f"## {name}\n"
    yield f"```\n{_write_signature(name, thing)}\n\n{inspect.getdoc(thing)}\n```\n"
    if thing is lpdeploy.PruneConfig:
        yield from _render_fields(thing)
        yield from _render_member(name, "from_preset", thing.from_preset)
    elif inspect.isclass(thing):
        for member, function in vars(thing).items():
            if inspect.isfunction(function) and not member.startswith("_"):
                yield from _render_member(name, member, function)


def _render_member(name: str, member: str, function: Any) -> Iterator[str]:
    yield f"### {name}.{member}\n"
    yield f"```\n{_write_signature(member, function)}\n\n{inspect.getdoc(function)}\n```\n"


def _write_signature(name: str, thing: Any) -> str:
    if thing is lpdeploy.PruneConfig:
        return f"{name}(*, ...)"
    signature = inspect.signature(thing)
    shown = [_simplify(p) for p in signature.parameters.values() if p.name != "self"]
    return f"{name}{signature.replace(parameters=shown, return_annotation=signature.empty)}"


def _simplify(parameter: inspect.Parameter) -> inspect.Parameter:
    """Drop the type of a parameter, and write a function as ``...``."""
    default = _Dots() if inspect.isfunction(parameter.default) else parameter.default
    return parameter.replace(annotation=parameter.empty, default=default)


class _Dots:
    def __repr__(self) -> str:
        return "..."


def _render_fields(config: Any) -> Iterator[str]:
    for group in GROUPS:
        rows = [own for own in dataclasses.fields(config) if get_option(own).group == group]
        lines = [f"| `{own.name}` | {own.default!r} | {get_option(own).help} |" for own in rows]
        yield "\n".join(
            [f"### {group}\n", "| field | default | what it does |", "|---|---|---|", *lines, ""]
        )
