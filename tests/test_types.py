"""What passes between rooms has a type, and what is on disk is read back as it was written."""

import ast
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lpdeploy.benchmark.results import LatencyResult, PruningResult
from lpdeploy.paper.results import CellResult, TableResult
from lpdeploy.paper.tables import TABLES
from lpdeploy.records import read_record

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lpdeploy"
# Formats that are not ours: lm-eval's config of a task, and tokenizer.json.
FOREIGN = {
    "evaluation/tasks.py: build_config",
    *("servers/tokenizers.py: describe_tokenizer", "servers/tokenizers.py: list_steps"),
}


def list_untyped(path):
    """Find public functions and methods that return a dict of anything."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.FunctionDef)
            and not node.name.startswith("_")
            and node.name != "to_json"
            and node.returns is not None
            and "dict[str, Any]" in ast.unparse(node.returns)
        ):
            yield f"{path.relative_to(PACKAGE)}: {node.name}"


def test_no_public_function_returns_a_dict_of_anything():
    found = {name for path in PACKAGE.rglob("*.py") for name in list_untyped(path)}
    assert found == FOREIGN


def choose_kind(data):
    if "table" in data:
        return TableResult
    if "undisturbed" in data:
        return CellResult
    if "limits" in data and "rows" in data:
        return LatencyResult
    return PruningResult if "workload" in data and "rows" in data else None


@pytest.mark.parametrize("kind", [LatencyResult, PruningResult, TableResult, CellResult])
def test_measurements_are_written_as_they_were_read(kind):
    texts = [path.read_text() for path in (ROOT / "docs" / "measurements").rglob("*.json")]
    own = [data for data in map(json.loads, texts) if choose_kind(data) is kind]
    assert own
    for data in own:
        data.pop("interrupted", None)  # an earlier version left it in some cells
        written = json.loads(json.dumps(read_record(kind, data).to_json()))
        if kind is TableResult:  # it describes itself in today's words
            data |= {name: getattr(TABLES[data["table"]], name) for name in ("title", "about")}
        assert written == data


@dataclass(frozen=True)
class Example:
    name: str
    options: dict[str, Any]
    count: int = 3


def test_a_field_with_a_default_may_be_missing_and_anything_may_be_any():
    options = {"a": None, "b": [True, 1.5]}
    found = read_record(Example, {"name": "x", "options": options, "later": 1})
    assert found == Example("x", options, 3)
    with pytest.raises(ValueError, match="options is missing"):
        read_record(Example, {"name": "x"})
    with pytest.raises(ValueError, match="count is True, not int"):
        read_record(Example, {"name": "x", "options": {}, "count": True})
