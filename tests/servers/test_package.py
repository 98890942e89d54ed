"""What package refuses, records and overwrites, whatever the server."""

import json

import pytest
from click.testing import CliRunner

from lpdeploy.artifacts import compute_sha256
from lpdeploy.cli.main import main
from lpdeploy.cli.package import command
from lpdeploy.errors import ArtifactError, LpdeployError
from lpdeploy.models.compact import compact
from lpdeploy.models.loading import compute_model_sha256, load_config
from lpdeploy.servers import verdicts
from lpdeploy.servers.package import PACKAGE_FILE, package
from tests.helpers import make_tiny_model
from tests.models.families import choose_kept, make_base, make_run


@pytest.fixture
def model(tmp_path):
    return make_tiny_model(tmp_path / "model")


@pytest.fixture
def run(tmp_path):
    base = make_base(tmp_path / "base", "llama-mha")
    return make_run(tmp_path / "run", base, choose_kept(base, heads=2, channels=20))


def test_the_command_offers_every_target():
    (target,) = (option.type for option in command.params if option.name == "target")
    assert {"triton", "genai", "vllm", "llamacpp"} == set(target.choices)
    for name in target.choices:
        assert callable(verdicts.get_server(name).load_packager())


def test_a_server_is_one_row(model, tmp_path, monkeypatch):
    server = verdicts.Server("toy", "1.0", "here", "A file.", (), "toy", f"{__name__}:package_toy")
    monkeypatch.setattr(verdicts, "SERVERS", (*verdicts.SERVERS, server))
    result = package(str(model), kind="toy", output=tmp_path / "out", greeting="hello").to_json()
    assert (tmp_path / "out" / "toy.txt").read_text() == "hello"
    assert result["command"] == "toy out"
    assert "toy" in [verdict.name for verdict in verdicts.list_verdicts(load_config(model))]
    (target,) = (option.type for option in command.params if option.name == "target")
    assert "toy" in target.choices


def package_toy(place, folder, *, output, greeting):
    (folder / "toy.txt").write_text(greeting)
    return verdicts.Packed(command=f"toy {output.name}")


def test_an_unknown_target_is_refused(model, tmp_path):
    with pytest.raises(LpdeployError, match="no package `target=tpu`. Use one of vllm, "):
        package(str(model), kind="tpu", output=tmp_path / "out")


def test_a_run_is_compacted_first(run, tmp_path):
    with pytest.raises(ArtifactError, match="No model in .*run'. Run 'lpdeploy compact .*run' fir"):
        package(str(run), kind="vllm", output=tmp_path / "out")


def test_the_run_keeps_the_record(run, tmp_path):
    compact(run)
    result = package(str(run), kind="vllm", output=tmp_path / "out", max_seq_len=64).to_json()
    entry = json.loads((run / "manifest.json").read_text())["stages"]["package vllm"]
    assert entry["options"] == {"model": str(run), "kind": "vllm", "max_seq_len": 64}
    assert entry["inputs"] == {"model": compute_model_sha256(run / "model")}
    assert entry["outputs"] == {"out": compute_sha256(tmp_path / "out" / PACKAGE_FILE)}
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert result["files"] == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert result["bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())


def test_a_model_of_others_is_left_as_it_is(model, tmp_path):
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    package(str(model), kind="vllm", output=tmp_path / "out")
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    stages = json.loads((tmp_path / "out" / "manifest.json").read_text())["stages"]
    assert stages["package vllm"]["inputs"] == {"model": compute_model_sha256(model)}


def test_an_existing_folder_is_kept(model, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ArtifactError, match="out' already exists"):
        package(str(model), kind="vllm", output=tmp_path / "out")
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="'mine.txt', which lpdeploy did not write"):
        package(str(model), kind="vllm", output=tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_a_package_replaces_another(model, tmp_path):
    package(str(model), kind="vllm", output=tmp_path / "out")
    (tmp_path / "out" / "config.json").unlink()
    package(str(model), kind="vllm", output=tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "config.json").read_bytes() == (model / "config.json").read_bytes()


def test_what_it_is_made_from_is_never_replaced(run, tmp_path):
    compact(run)
    for output in (run, run / "model", tmp_path):
        with pytest.raises(ArtifactError, match="holds what it is made from"):
            package(str(run), kind="vllm", output=output, overwrite=True)
    with pytest.raises(ArtifactError, match="lies inside"):
        package(str(run), kind="vllm", output=run / "model" / "vllm")
    assert package(str(run), kind="vllm", output=run / "vllm").output == str(run / "vllm")


def test_an_option_of_another_target_is_refused(model, tmp_path):
    with pytest.raises(LpdeployError, match="`max_batch` is not an option of"):
        package(str(model), kind="vllm", output=tmp_path / "out", max_batch=4)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["vllm", "llamacpp"])
def test_layers_of_different_widths(tmp_path, kind):
    # Three and one KV heads of three query heads each; 40 and 24 channels: two and 32 on average.
    model = make_tiny_model(
        tmp_path / "model", model_type="lpdeploy_mistral", heads=12, kv_heads=4,
        layer_widths=[[3, 40], [1, 24]],
    )  # fmt: skip
    with pytest.raises(ArtifactError) as caught:
        package(str(model), kind=kind, output=tmp_path / "out")
    assert f"does not load '{model}'" in str(caught.value)
    assert (
        "Prune with `scope=layer`. The nearest shape that it takes has 6 heads (2 KV) and 32 "
        in (str(caught.value))
    )
    assert not (tmp_path / "out").exists()


def test_heads_that_do_not_divide(tmp_path):
    model = make_tiny_model(tmp_path / "model", model_type="mistral", heads=3)
    with pytest.raises(
        ArtifactError, match="3 attention heads do not divide .* Use `round_heads_to"
    ):
        package(str(model), kind="vllm", output=tmp_path / "out", tensor_parallel=2)


def test_what_scripts_and_people_read(model, tmp_path):
    words = ["package", str(model), "--target", "vllm", "--output", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert (data["target"], data["output"]) == ("vllm", str(tmp_path / "out"))
    assert data["command"] in result.stderr.splitlines()
    assert data["command"] in (tmp_path / "out" / "README.md").read_text()
    again = CliRunner().invoke(main, words)
    assert again.exit_code == 1
    assert "already exists" in again.stderr
    assert CliRunner().invoke(main, [*words, "--target", "tgi"]).exit_code == 2
