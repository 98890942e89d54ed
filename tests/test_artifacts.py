import json
import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from lpdeploy.artifacts import atomic_file, check_unchanged, compute_sha256, save_json
from lpdeploy.errors import ArtifactError
from lpdeploy.folders import FOLDER_RECORD, MANIFEST, atomic_folder, remove_leftovers
from lpdeploy.manifest import load_stage, record_stage


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
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "model", kind="model") as temporary:
        (temporary / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_never_overwritten_unasked(tmp_path):
    (tmp_path / "model").mkdir()
    with (
        pytest.raises(ArtifactError, match="already exists"),
        atomic_folder(tmp_path / "model", kind="model"),
    ):
        pass


def write_folder(path, *names, kind="model", overwrite=False):
    with atomic_folder(path, kind=kind, overwrite=overwrite) as temporary:
        for name in names:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).write_text("x")
    return path


def test_overwriting_replaces_the_whole_folder(tmp_path):
    folder = write_folder(tmp_path / "model", "old", "deep/old")
    write_folder(folder, "new", overwrite=True)
    assert sorted(p.name for p in folder.iterdir()) == [FOLDER_RECORD, "new"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["thesis.txt", "deep/thesis.txt", ".hidden", "new/thesis.txt"])
def test_a_folder_with_a_file_of_somebody_else_is_never_replaced(tmp_path, name):
    folder = write_folder(tmp_path / "model", "old", "deep/old")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("years")
    with pytest.raises(ArtifactError, match=f"'{name}', which lpdeploy did not write"):
        write_folder(folder, "new", overwrite=True)
    assert (folder / name).read_text() == "years"
    assert (folder / "old").exists()


def test_a_folder_of_somebody_else_is_never_replaced(tmp_path):
    (tmp_path / "lpdeploy.json").write_text("{}")
    (tmp_path / FOLDER_RECORD).write_text("[]")
    with pytest.raises(ArtifactError, match="'lpdeploy.json', which lpdeploy did not write"):
        write_folder(tmp_path, overwrite=True)


def test_a_result_of_another_kind_is_never_replaced(tmp_path):
    folder = write_folder(tmp_path / "out", "old", kind="adapter")
    with pytest.raises(ArtifactError, match="another result of lpdeploy .adapter"):
        write_folder(folder, kind="model", overwrite=True)


def test_what_lies_in_a_folder_by_a_record_of_its_own_is_replaced_too(tmp_path):
    folder = write_folder(tmp_path / "model", "weights")
    write_folder(folder / "ort", "graph", kind="export")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "x.pyc").write_text("x")
    write_folder(folder, "weights", overwrite=True)
    assert not (folder / "ort").exists()


def test_a_file_in_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(ArtifactError, match="not a folder"):
        write_folder(tmp_path / "model", overwrite=True)


@pytest.mark.parametrize(
    "name",
    [".model.tmp-", ".model.old-x", ".model.tmp-1-2", ".modelx.tmp-1", ".model.tmp-0",
     ".model.old-" + "9" * 30, ".model.tmp-\n1", ".model.tmp-\u0664"],
)  # fmt: skip
def test_a_file_that_is_named_like_a_leftover_is_left_alone(tmp_path, name):
    (tmp_path / name).write_text("mine")
    write_folder(tmp_path / "model", "new")
    assert (tmp_path / name).exists()


def test_leftovers_of_dead_processes_go_and_those_of_living_stay(tmp_path):
    dead, alive = tmp_path / ".model.tmp-999999999", tmp_path / ".model.tmp-1"
    dead.mkdir()
    alive.mkdir()
    remove_leftovers(tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == [alive.name]


def test_the_only_whole_folder_is_put_back(tmp_path):
    folder, aside = tmp_path / "model", tmp_path / ".model.old-999999999"
    write_folder(folder, "weights")
    folder.rename(aside)  # as a process leaves it that dies between the two renames
    with pytest.raises(ZeroDivisionError), atomic_folder(folder, kind="model", overwrite=True):
        1 / 0  # noqa: B018
    assert (folder / "weights").exists()
    folder.rename(aside)
    with pytest.raises(ArtifactError, match="already exists"):
        write_folder(folder, "new")
    write_folder(folder, "new", overwrite=True)
    assert (folder / "new").exists()
    folder.rename(tmp_path / "first")
    write_folder(folder, "newer")
    (tmp_path / "first").rename(aside)  # the new one stands
    write_folder(folder, "newest", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_lpdeploy_did_not_write_is_not_put_back(tmp_path):
    (tmp_path / ".model.old-999999999").mkdir()
    write_folder(tmp_path / "model", "new")
    assert (tmp_path / "model" / "new").exists()


def test_a_link_that_is_named_like_a_leftover_loses_nothing_but_itself(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    (tmp_path / ".model.tmp-999999999").symlink_to(tmp_path / "mine")
    write_folder(tmp_path / "model", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "model"]
    assert (tmp_path / "mine" / "file").read_text() == "mine"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_others_may_read_what_the_umask_lets_them(tmp_path, umask, mode):
    """Though safetensors lets only the owner read."""
    before = os.umask(umask)
    try:
        with atomic_file(tmp_path / "file") as temporary:
            save_file({"x": torch.zeros(1)}, temporary)
        with atomic_folder(tmp_path / "folder", kind="model") as folder:
            save_file({"x": torch.zeros(1)}, folder / "file")
    finally:
        os.umask(before)
    for path in (tmp_path / "file", tmp_path / "folder" / "file"):
        assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_file_of_somebody_else_keeps_its_mode(tmp_path):
    (tmp_path / "secret").write_text("x")
    (tmp_path / "secret").chmod(0o600)
    with atomic_folder(tmp_path / "folder", kind="model") as folder:
        (folder / "link").symlink_to(tmp_path / "secret")
        (folder / "same").hardlink_to(tmp_path / "secret")
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600


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
    with pytest.raises(ArtifactError, match="has changed since it was written. Restore it."):
        check_unchanged(path, "0" * 64, fix="Restore it.")


def test_stages_are_recorded_side_by_side(tmp_path):
    with record_stage(tmp_path, "prune", {"ratio": 0.5}) as stage:
        stage.inputs["base"] = "abc"
    with record_stage(tmp_path, "compact", {}):
        pass
    entry = load_stage(tmp_path, "prune")
    assert entry.options == {"ratio": 0.5}
    assert entry.inputs == {"base": "abc"}
    assert entry.seconds >= 0
    assert entry.peak_bytes > 1e6
    assert entry.versions["lpdeploy"]
    assert load_stage(tmp_path, "compact")
    assert load_stage(tmp_path, "export") is None


def test_a_failed_stage_is_not_recorded(tmp_path):
    with pytest.raises(RuntimeError), record_stage(tmp_path, "prune", {}):
        raise RuntimeError
    assert not (tmp_path / MANIFEST).exists()
