"""Finding a checkpoint: in a folder or on the hub, and what is said where there is none."""

import json
import shutil

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from lpdeploy.errors import ArtifactError
from lpdeploy.models.find import check_model, list_weight_files, resolve_model
from lpdeploy.models.loading import load_model

WEIGHTS = "model.safetensors"


@pytest.fixture
def base(bases, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(bases("llama-gqa"), tmp_path / "base")


def forbid_hub(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)


def test_a_folder_is_itself(base, monkeypatch):
    forbid_hub(monkeypatch)
    assert resolve_model(str(base)) == base


def test_a_folder_without_a_config_is_refused(base, monkeypatch):
    forbid_hub(monkeypatch)
    (base / "config.json").unlink()
    with pytest.raises(ArtifactError, match=r"it has no config.json. Give a folder that"):
        resolve_model(str(base))


@pytest.mark.parametrize(
    "error", [LocalEntryNotFoundError("no network"), OSError("no network"), ConnectionError("no n")]
)
def test_a_name_that_the_hub_does_not_give_is_refused(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(
        ArtifactError,
        match=r"no folder 'nobody/nothing' here, and the hub .*\(no n.*\). Check the path or ",
    ):
        resolve_model("nobody/nothing")


def test_a_path_that_is_no_folder_is_refused_without_a_network(base):
    for path in (str(base / "no" / "such" / "folder"), "./folder", "my/own/folder"):
        with pytest.raises(ArtifactError, match=rf"^There is no folder '{path}'. Check the path"):
            resolve_model(path)


def test_a_hub_name_gives_its_snapshot(base, monkeypatch):
    asked = []

    def download(name, *, allow_patterns):
        asked.append((name, allow_patterns))
        return str(base)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_model("owner/name") == base
    ((name, patterns),) = asked
    assert name == "owner/name"
    assert "*.safetensors" in patterns
    assert not any("bin" in pattern or pattern == "*" for pattern in patterns)  # no pickles


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_refused_with_the_reason(base, name):
    (base / WEIGHTS).rename(base / name)
    with pytest.raises(
        ArtifactError, match=r"only pickled weights, which can run code .*save_pretrained"
    ):
        resolve_model(str(base))


def test_a_config_without_weights_is_refused(base):
    (base / WEIGHTS).unlink()
    with pytest.raises(ArtifactError, match=r"no \*.safetensors weights. Give a complete"):
        resolve_model(str(base))


def test_the_shards_of_an_index_are_listed(bases, tmp_path):
    load_model(bases("llama-gqa")).save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"not of the model")
    assert list_weight_files(tmp_path) == sorted(tmp_path.glob("model-*.safetensors"))


def test_a_whole_file_counts_before_an_index_as_in_transformers(base):
    other = {name: 0 * tensor for name, tensor in load_file(base / WEIGHTS).items()}
    save_file(other, base / "other.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(other, "other.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    assert list_weight_files(base) == [base / WEIGHTS]
    assert load_model(base).lm_head.weight.any()


@pytest.mark.parametrize("text", ["{", "{}"])
def test_a_broken_index_is_refused(base, text):
    (base / WEIGHTS).unlink()
    (base / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"Copy the checkpoint anew|Give a complete"):
        resolve_model(str(base))


def test_a_check_asks_no_hub_and_says_of_a_folder_what_loading_would(base, monkeypatch):
    forbid_hub(monkeypatch)
    check_model(str(base))
    check_model("owner/name")
    with pytest.raises(ArtifactError, match="There is no folder './folder'"):
        check_model("./folder")
    (base / WEIGHTS).unlink()
    with pytest.raises(ArtifactError, match="Give a complete"):
        check_model(str(base))
