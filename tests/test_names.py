"""Engines, criteria and artifacts are each named in one place; families: tests/families."""

import ast
from pathlib import Path

import lpdeploy
from lpdeploy.criteria import CRITERIA
from lpdeploy.engines import ENGINES
from lpdeploy.run_folder import ADAPTER, RunFolder

ROOT = Path(lpdeploy.__file__).parent
# Python packages and their extras, some of which are called as an engine is.
PACKAGES = {
    *("machine.py", "paper/render.py", "extras.py", "engines/trt/library.py"),
    *("pruning/checkpoint.py", "pruning/run.py"),
}
# Rows of the paper's tables are criteria; a checkpoint has a section for LoRA's weights.
ROWS = {"paper/tables.py", "paper/figures.py", "paper/cells.py", "pruning/checkpoint.py"}
ROWS |= {"presets.py"}  # which choose one
# Records of exports have a field of that name.
FIELDS = {"publish/files.py"}


def list_strings(path):
    """List the strings in code that are a name: not defaults, docstrings or single letters."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    defaults = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.arguments):
            defaults |= {id(part) for d in (*node.defaults, *node.kw_defaults) if d
                         for part in ast.walk(d)}  # fmt: skip
        if isinstance(node, ast.keyword) and node.arg == "default":
            defaults.add(id(node.value))
    for node in ast.walk(tree):
        name = node.value if isinstance(node, ast.Constant) else None
        if isinstance(name, str) and id(node) not in defaults:
            yield name


def find_places(names, *, but=()):
    """Map each name to the modules that spell it."""
    places = {name: set() for name in names}
    for path in ROOT.rglob("*.py"):
        file = str(path.relative_to(ROOT))
        for found in places.keys() & set(list_strings(path)) if file not in but else ():
            places[found].add(file)
    return places


def test_an_engine_is_named_by_its_record():
    expected = {name: {f"engines/{name}/__init__.py"} for name in ENGINES}
    assert find_places(ENGINES, but=PACKAGES) == expected


def test_a_criterion_is_named_by_its_record():
    expected = {name: {f"criteria/{name}.py"} for name in CRITERIA}
    assert find_places(CRITERIA, but=ROWS) == expected


def test_an_artifact_is_named_by_the_run_folder():
    run = RunFolder(Path())
    words = {run.model.name, run.base.name, run.unmerged.name}  # which are said of other things
    names = {path.name for path in (*run._files, *run._folders)} - words
    places = find_places({*names, run.checkpoint.parent.name}, but=FIELDS)
    assert places[run.plan.name] == places[ADAPTER] == {"run_folder.py"}
    assert {name: found for name, found in places.items() if len(found) > 1} == {}
