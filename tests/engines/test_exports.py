"""An export of another model than is there now is refused by everything that reads exports."""

import shutil

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from lpdeploy.cli.main import main
from tests.helpers import make_text, make_tiny_model

SMALL = [
    "--steps", "2", "--batch-size", "2", "--micro-batch-size", "2", "--seq-len", "16",
    "--prune-every", "1", "--round-to", "4", "--calibration-samples", "2", "--device", "cpu",
]  # fmt: skip
SHORT = ["--engine", "ort", "--tokens", "4", "--repeats", "1"]


def invoke(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def build_run(root, *, ratio, seed=0):
    words = ("prune", root / "base", "--data", root / "text.txt", "--output", root / "run", *SMALL)
    for command in (
        (*words, "--ratio", ratio, "--seed", seed, "--overwrite"),
        ("compact", root / "run"),
        ("compact", root / "run", "--keep-adapter"),
    ):
        result = invoke(*command)
        assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def stale(tmp_path_factory):
    """A run that was pruned anew, in which exports of the first pruning lie."""
    root = tmp_path_factory.mktemp("stale")
    make_tiny_model(root / "base", head_dim=16, intermediate_size=64, num_hidden_layers=1)
    make_text(root / "text.txt")
    build_run(root, ratio=0.5)
    for words in ([], ["--unmerged"]):
        assert invoke("export", root / "run", "--engine", "ort", *words).exit_code == 0
    names = ("ort", "ort-unmerged")
    for name in names:
        shutil.copytree(root / "run" / name, root / name)
    build_run(root, ratio=0.5, seed=1)
    for name in names:
        assert not (root / "run" / name).exists()  # the new run has removed them
        shutil.copytree(root / name, root / "run" / name)
    return root


READERS = {
    "eval": lambda run: ("eval", run, "--engine", "ort", "--perplexity", run.parent / "text.txt"),
    "verify": lambda run: ("verify", run, "--engine", "ort"),
    "bench": lambda run: ("bench", "latency", run, *SHORT, "--merged"),
    "package genai": lambda run: ("package", run, "--target", "genai", "--output", run / "p"),
    "package triton": lambda run: ("package", run, "--target", "triton", "--output", run / "p"),
    "push": lambda run: ("push", run, "--repo", "owner/name"),
    "report": lambda run: ("report", run),
}


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_refuses_an_export_of_another_run(stale, reader):
    result = invoke(*READERS[reader](stale / "run"))
    assert result.exit_code == 1, result.output
    sentence = " ".join(result.stderr.split())
    assert "was exported from another model" in sentence
    assert f"lpdeploy export {stale / 'run'} --engine ort" in sentence
    assert "--overwrite' first" in sentence


def test_an_unmerged_export_of_another_run_is_refused(stale):
    result = invoke("bench", "latency", stale / "run", *SHORT, "--unmerged")
    assert result.exit_code == 1
    assert "--engine ort --unmerged --overwrite' first" in " ".join(result.stderr.split())


def test_an_export_of_a_model_folder_whose_weights_have_changed_is_refused(stale, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(stale / "base", model)
    assert invoke("export", model, "--engine", "ort").exit_code == 0
    words = ("eval", model, "--engine", "ort", "--perplexity", stale / "text.txt", "--seq-len", 16)
    assert invoke(*words).exit_code == 0
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    result = invoke(*words)
    assert result.exit_code == 1
    assert "was exported from another model" in " ".join(result.stderr.split())


def test_a_model_of_another_plan_is_refused(stale, tmp_path):
    shutil.copytree(stale / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    words = ("prune", stale / "base", "--data", stale / "text.txt", "--output", tmp_path / "other")
    assert invoke(*words, *SMALL, "--ratio", "0.25").exit_code == 0
    assert invoke("compact", tmp_path / "other").exit_code == 0
    shutil.copytree(tmp_path / "other" / "model", tmp_path / "run" / "model")
    result = invoke("eval", tmp_path / "run", "--perplexity", stale / "text.txt")
    assert result.exit_code == 1
    assert "another plan" in result.stderr


def test_a_runs_model_folder_is_the_same_place_as_the_run(stale, tmp_path):
    shutil.copytree(stale / "run", tmp_path / "run")
    assert invoke("export", tmp_path / "run" / "model", "--engine", "ort").exit_code == 1
    result = invoke("export", tmp_path / "run" / "model", "--engine", "ort", "--overwrite")
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "run" / "model" / "ort").exists()
    assert invoke("verify", tmp_path / "run", "--engine", "ort").exit_code == 1  # ort-unmerged
    shutil.rmtree(tmp_path / "run" / "ort-unmerged")
    assert invoke("verify", tmp_path / "run", "--engine", "ort").exit_code == 0
