"""Every example runs as its first lines say, on the demo's model."""

import importlib.util
import json
from importlib import resources
from pathlib import Path

import pytest

from lpdeploy.criteria import CRITERIA

pytestmark = pytest.mark.slow
FOLDER = Path(__file__).parent.parent.parent / "examples"
ASSETS = Path(str(resources.files("lpdeploy.demo"))) / "assets"
MODEL, TRAIN, VALID = (str(ASSETS / name) for name in ("story-llama-1M", "train.txt", "valid.txt"))


def run_example(name, *words):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(*map(str, words))


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    output = tmp_path_factory.mktemp("line") / "run"
    run_example("the_line", MODEL, VALID, VALID, output)
    return output


def test_the_line(line):
    assert (line / "model" / "model.safetensors").is_file()
    assert (line / "eval.json").is_file()


def test_serving(line, tmp_path, capsys):
    run_example("serving", line, tmp_path / "served")
    assert "vllm serve" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["own_loop", "sft_trainer"])
def test_a_loop_or_a_trainer(name, tmp_path):
    if name == "sft_trainer":
        pytest.importorskip("trl")
    run_example(name, MODEL, VALID, tmp_path / "run")
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_a_new_criterion(tmp_path, capsys):
    try:
        run_example("new_criterion", MODEL, VALID, tmp_path / "run")
    finally:
        CRITERIA.pop("relative", None)
    assert "heads" in capsys.readouterr().out


def test_all_are_here():
    names = {path.stem for path in FOLDER.glob("*.py")}
    here = {"the_line", "own_loop", "sft_trainer", "new_criterion", "serving"}
    # The tests of real servers run the last one, in an environment of its own.
    assert names == here | {"quantize_for_vllm"}


def test_the_notebook(tmp_path, monkeypatch, capsys):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((FOLDER / "pruning.ipynb").read_text())
    assert all(not cell.get("outputs") for cell in notebook["cells"])
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names = {}
    for cell in cells:
        exec(cell, names)
    assert names["steps"][-1].achieved["heads"] == 0.5
    assert "original: perplexity" in capsys.readouterr().out
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
