"""What the compact stage refuses, with the fix in the sentence and nothing left behind."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from lpdeploy.artifacts import compute_sha256, save_json
from lpdeploy.errors import ArtifactError
from lpdeploy.manifest import record_stage
from lpdeploy.models.compact import compact, find_base
from lpdeploy.models.loading import compute_model_sha256
from lpdeploy.run_folder import RunFolder
from tests.models.families import choose_kept, edit_json, make_base, make_run


@pytest.fixture
def base(tmp_path):
    return make_base(tmp_path / "base", "llama-gqa")


@pytest.fixture
def run(base, tmp_path):
    return make_run(tmp_path / "run", base, choose_kept(base, heads=3, channels=20))


def assert_nothing_left(run):
    """A refused compact leaves neither a model nor a temporary folder."""
    assert {path.name for path in run.iterdir()} <= {
        ".lock",
        "adapter",
        "manifest.json",
        "plan.json",
    }


def test_a_run_without_a_plan_is_refused(run):
    (run / "plan.json").unlink()
    with pytest.raises(ArtifactError, match=r"No plan.json in '.*run'. Run 'lpdeploy prune"):
        compact(run)


def test_a_changed_base_is_refused(base, run):
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"not the one that was pruned: .* Restore it, or"):
        compact(run)
    assert_nothing_left(run)


def test_a_base_that_is_gone_is_refused(base, run, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shutil.rmtree(base)
    with pytest.raises(ArtifactError, match=r"There is no folder '.*'. Check the path, or"):
        compact(run)
    assert_nothing_left(run)


def record_adapter(run):
    with record_stage(run, "prune", {}) as stage:
        stage.outputs = {"adapter": compute_sha256(run / "adapter")}


def test_a_changed_adapter_is_refused(run):
    record_adapter(run)
    path = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[min(tensors)][0, 0] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"adapter' has changed .* Prune again, or restore"):
        compact(run)
    assert_nothing_left(run)


@pytest.mark.parametrize("recorded", [True, False])
def test_a_missing_adapter_is_refused(run, recorded):
    if recorded:
        record_adapter(run)
    shutil.rmtree(run / "adapter")
    with pytest.raises(ArtifactError, match=r"adapter'.* Prune again"):
        compact(run)
    assert_nothing_left(run)


@pytest.mark.parametrize("keep_adapter", [False, True])
def test_an_adapter_of_another_run_is_refused(base, run, tmp_path, keep_adapter):
    other = make_run(tmp_path / "other", base, choose_kept(base, heads=3, channels=21))
    shutil.rmtree(run / "adapter")
    shutil.copytree(other / "adapter", run / "adapter")
    with pytest.raises(ArtifactError, match=r"are of different runs: the plan leaves 20 rows"):
        compact(run, keep_adapter=keep_adapter)
    assert_nothing_left(run)


def test_an_adapter_of_fewer_layers_is_not_merged_in_part(run):
    path = run / "adapter" / "adapter_model.safetensors"
    tensors = {n: t for n, t in load_file(path).items() if ".layers.1.mlp.up_proj." not in n}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"only one of them has model.layers.1.mlp.up_proj"):
        compact(run)
    assert_nothing_left(run)


def test_a_plan_of_other_groups_is_refused(base, run):
    plan = json.loads((run / "plan.json").read_text())
    plan["specs"][0]["slices"][0]["block"] = 8
    save_json(run / "plan.json", plan)
    with pytest.raises(ArtifactError, match=r"lists other groups than .* Prune again"):
        find_base(RunFolder(run).load_plan())
    with pytest.raises(ArtifactError, match=r"lists other groups than .* Prune again"):
        compact(run)


def rehash(run, base):
    """Make a damaged base the one that the plan was made for."""
    edit_json(run / "plan.json", base_sha256=compute_model_sha256(base))


def test_a_truncated_base_is_refused(base, run):
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    rehash(run, base)
    with pytest.raises(ArtifactError, match=r"cannot be read: .* Copy the checkpoint anew"):
        compact(run)
    assert_nothing_left(run)


def test_a_base_without_one_of_its_weights_is_refused(base, run):
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.0.mlp.down_proj.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    rehash(run, base)
    with pytest.raises(ArtifactError, match="lacks 1 weights .*down_proj"):
        compact(run)
    assert_nothing_left(run)


def test_an_output_is_replaced_only_when_asked(run):
    compact(run)
    before = (run / "model" / "lpdeploy.json").read_bytes()
    with pytest.raises(ArtifactError, match=r"already exists"):
        compact(run)
    assert (run / "model" / "lpdeploy.json").read_bytes() == before
    compact(run, overwrite=True, max_shard_bytes=5000)
    assert len(list((run / "model").glob("*.safetensors"))) > 1


def test_a_failed_overwrite_leaves_what_was_there(base, run):
    compact(run)
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    rehash(run, base)
    before = compute_model_sha256(run / "model")
    with pytest.raises(ArtifactError, match="cannot be read"):
        compact(run, overwrite=True)
    assert compute_model_sha256(run / "model") == before


@pytest.mark.parametrize("what", ["run", "base"])
def test_neither_run_nor_base_is_overwritten(base, run, what):
    """Or the inputs would be gone, and the output could not be made again."""
    before = compute_sha256(run / "adapter"), compute_model_sha256(base)
    with pytest.raises(ArtifactError, match=r"holds what it is made from"):
        compact(run, output={"run": run, "base": base}[what], overwrite=True)
    with pytest.raises(ArtifactError, match=r"holds what it is made from"):
        compact(run, output=run.parent, overwrite=True)  # both lie in it
    assert (compute_sha256(run / "adapter"), compute_model_sha256(base)) == before
