import json

import pytest

from lpdeploy import artifacts
from lpdeploy.artifacts import (
    atomic_file,
    atomic_folder,
    check_unchanged,
    compute_sha256,
    load_json,
    load_stage,
    record_stage,
    remove_leftovers,
    save_json,
)
from lpdeploy.errors import ArtifactError


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    save_json(path, {"x": 1})
    assert json.loads(path.read_text()) == {"x": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    save_json(path, {"x": 1})
    with pytest.raises(TypeError):
        save_json(path, {"x": object()})
    assert json.loads(path.read_text()) == {"x": 1}


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "model") as temporary:
        (temporary / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_never_overwritten_unasked(tmp_path):
    (tmp_path / "model").mkdir()
    with (
        pytest.raises(ArtifactError, match="exists already. Use --overwrite"),
        atomic_folder(tmp_path / "model"),
    ):
        pass


def test_overwriting_replaces_the_whole_folder(tmp_path):
    (tmp_path / "model").mkdir()
    for name in ("old", "lpdeploy.json"):
        (tmp_path / "model" / name).write_text("x")
    with atomic_folder(tmp_path / "model", overwrite=True) as temporary:
        (temporary / "new").write_text("x")
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_folder_of_somebody_else_is_never_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("years")
    with (
        pytest.raises(ArtifactError, match="holds files that lpdeploy did not write"),
        atomic_folder(tmp_path, overwrite=True),
    ):
        pass
    assert (tmp_path / "thesis.txt").read_text() == "years"


def test_leftovers_of_dead_processes_go_and_those_of_living_stay(tmp_path):
    dead, alive = tmp_path / ".model.tmp-999999999", tmp_path / ".model.tmp-1"
    dead.mkdir()
    alive.mkdir()
    remove_leftovers(tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == [alive.name]


def test_missing_and_broken_json_tell_the_fix(tmp_path):
    with pytest.raises(ArtifactError, match="No a.json in .* Make it."):
        load_json(tmp_path / "a.json", fix="Make it.")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ArtifactError, match="not valid JSON .* Make it."):
        load_json(tmp_path / "a.json", fix="Make it.")


def test_a_hash_sees_names_and_contents(tmp_path):
    (tmp_path / "a.json").write_text("1")
    first = compute_sha256(tmp_path)
    (tmp_path / "a.json").rename(tmp_path / "b.json")
    second = compute_sha256(tmp_path)
    (tmp_path / "b.json").write_text("2")
    assert len({first, second, compute_sha256(tmp_path)}) == 3


def test_a_changed_input_is_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("1")
    check_unchanged(path, compute_sha256(path), fix="Restore it.")
    check_unchanged(path, None, fix="Restore it.")
    with pytest.raises(ArtifactError, match="has changed since it was recorded. Restore it."):
        check_unchanged(path, "0" * 64, fix="Restore it.")


def test_stages_are_recorded_side_by_side(tmp_path):
    with record_stage(tmp_path, "prune", {"ratio": 0.5}) as stage:
        stage.inputs["base"] = "abc"
    with record_stage(tmp_path, "compact", {}):
        pass
    entry = load_stage(tmp_path, "prune")
    assert entry["options"] == {"ratio": 0.5}
    assert entry["inputs"] == {"base": "abc"}
    assert entry["seconds"] >= 0
    assert entry["peak_bytes"] > 1e6
    assert entry["versions"]["lpdeploy"]
    assert load_stage(tmp_path, "compact")
    assert load_stage(tmp_path, "export") == {}


def test_a_failed_stage_is_not_recorded(tmp_path):
    with pytest.raises(RuntimeError), record_stage(tmp_path, "prune", {}):
        raise RuntimeError
    assert not (tmp_path / artifacts.MANIFEST).exists()
