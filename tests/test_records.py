import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from lpdeploy.errors import ArtifactError
from lpdeploy.records import format_json, load_json, load_record, load_record_lines, parse_json


@dataclass(frozen=True)
class Inner:
    size: int
    share: float = 0.5


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner
    items: tuple[Inner, ...] = ()
    numbers: list[int] = field(default_factory=list)
    pair: tuple[int, str] = (0, "")
    table: Mapping[str, float] = field(default_factory=dict)
    kind: Literal["a", "b"] = "a"
    maybe: int | None = None
    yes: bool = True
    anything: Any = None


GOOD = {"name": "x", "inner": {"size": 1}}


def write(path, data):
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def test_what_was_written_is_read(tmp_path):
    whole = Outer(
        "x", Inner(1, 2.0), (Inner(2), Inner(3)), [4, 5], (6, "y"), {"z": 7.0}, "b", 8, False, [9]
    )  # fmt: skip
    path = tmp_path / "a.json"
    path.write_text(format_json(asdict(whole)))
    assert load_record(Outer, path, fix="") == whole


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"name": None}, "name is null, not str"),
        ({"name": ["x"]}, "name is a list, not str"),
        ({"inner": 3}, "inner is 3, not an object"),
        ({"inner": {}}, "inner.size is missing"),
        ({"inner": {"size": True}}, "inner.size is True, not int"),
        ({"inner": {"size": 1.5}}, "inner.size is 1.5, not int"),
        ({"items": [{"size": 1}, {"size": "x"}]}, r"items\[1\].size is 'x', not int"),
        ({"items": {}}, "items is an object, not a list"),
        ({"numbers": [1, None]}, r"numbers\[1\] is null, not int"),
        ({"pair": [1]}, "pair is a list, not a list of 2"),
        ({"table": {"a": "b"}}, "table.a is 'b', not float"),
        ({"table": [1]}, "table is a list, not an object"),
        ({"kind": "c"}, "kind is 'c', not 'a' or 'b'"),
        ({"kind": []}, "kind is a list, not 'a' or 'b'"),
        ({"maybe": "x"}, "maybe is 'x', not int or null"),
        ({"yes": 1}, "yes is 1, not bool"),
        ({"name": "x" * 1000, "yes": "y" * 1000}, "yes is '" + "y" * 39 + ", not bool"),
    ],
)
def test_a_value_of_another_type_is_named(change, sentence, tmp_path):
    path = write(tmp_path / "a.json", GOOD | change)
    with pytest.raises(ArtifactError, match=rf"a.json' cannot be used: {sentence}. Mend it."):
        load_record(Outer, path, fix="Mend it.")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ("[" * 100_000, "it is nested too deeply"),
        ("9" * 5000, "4300 digits"),
        ('{"a": NaN}', "it holds NaN, which is no JSON number"),
        ('{"a": [-Infinity]}', "it holds -Infinity, which is no JSON number"),
    ],
)
def test_what_is_no_json_is_refused(text, sentence, tmp_path):
    path = write(tmp_path / "a.json", text)
    with pytest.raises(ArtifactError, match=rf"not valid JSON \(.*{sentence}.*\). Mend it."):
        load_json(path, fix="Mend it.")


def test_what_is_no_text_file_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"No a.json in .*\. Mend it."):
        load_json(tmp_path / "a.json", fix="Mend it.")
    with pytest.raises(ArtifactError, match="is not a regular file. Mend it."):
        load_json(tmp_path, fix="Mend it.")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ArtifactError, match="pipe' is not a regular file. Mend it."):
        load_json(tmp_path / "pipe", fix="Mend it.")
    (tmp_path / "a.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ArtifactError, match="is not UTF-8 text .* Mend it."):
        load_json(tmp_path / "a.json", fix="Mend it.")
    with (tmp_path / "large.json").open("wb") as stream:
        stream.truncate(2 << 30)
    with pytest.raises(ArtifactError, match="has 2,147,483,648 bytes; at most"):
        load_json(tmp_path / "large.json", fix="Mend it.")


def test_json_has_names_for_what_is_not_finite(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(format_json({"size": 1, "share": math.inf}))
    assert json.loads(path.read_text())["share"] == "Infinity"
    assert load_record(Inner, path, fix="").share == math.inf
    path.write_text(format_json({"size": 1, "share": -math.inf}))
    assert load_record(Inner, path, fix="").share == -math.inf
    path.write_text(format_json({"size": 1, "share": math.nan}))
    assert math.isnan(load_record(Inner, path, fix="").share)
    assert parse_json(format_json([(1.0, math.nan)], indent=None)) == [[1.0, "NaN"]]


def test_another_version_is_refused(tmp_path):
    for data, found in ((GOOD, "None"), (GOOD | {"schema_version": 2}, "2"), ([], "None")):
        path = write(tmp_path / "a.json", data)
        with pytest.raises(ArtifactError, match=f"schema version {found}; this lpdeploy reads 1"):
            load_record(Outer, path, fix="", schema_version=1)
    write(path, GOOD | {"schema_version": 1})
    assert load_record(Outer, path, fix="", schema_version=1).name == "x"


def test_lines_are_read_and_a_cut_one_left_out(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"size": 1}\n{"size": 2}\n{"si')
    found = load_record_lines(Inner, path, fix="")
    assert found == [('{"size": 1}', Inner(1)), ('{"size": 2}', Inner(2))]
    write(path, '{"size": 1}\n{"si\n')
    with pytest.raises(ArtifactError, match="a.jsonl', line 2, cannot be used: .* Mend it."):
        load_record_lines(Inner, path, fix="Mend it.")


def test_no_other_module_reads_json_by_itself():
    package = Path(__file__).parents[1] / "lpdeploy"
    found = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if "json.load" in path.read_text()
    }
    # The others read no files of ours: rows of data, a library's text, what a client sends, and
    # what Triton's Python backend, which has no lpdeploy, is given.
    assert found == {
        "data/sources.py", "records.py", "servers/tokenizers.py",
        "servers/triton/service.py", "servers/triton/text_model.py",
        "servers/triton/whole_model.py",
    }  # fmt: skip
