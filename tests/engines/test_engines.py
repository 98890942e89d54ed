"""The records of engines: complete, light, and open to what comes from outside."""

import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import lpdeploy
from lpdeploy.cli.main import main
from lpdeploy.config import PruneConfig
from lpdeploy.engines import ENGINES, get_engine, list_exporting
from lpdeploy.engines.export import export
from lpdeploy.errors import LpdeployError
from lpdeploy.models.compact import compact
from lpdeploy.pruning.run import prune
from tests.helpers import make_text, make_tiny_model
from tests.toy_engine import TOY

ROOT = Path(lpdeploy.__file__).parent
EXPORTERS = {"onnx": "export_onnx", "ort": "export_ort", "trt": "export_tensorrt"}
# Arguments that the stage gives, and one that only the engine trt gives.
GIVEN = {"model_folder", "output", "adapter", "overwrite", "precision", "in_place"}


def test_options_of_a_record_are_those_of_its_exporter():
    for name, function in EXPORTERS.items():
        exporter = importlib.import_module(f"lpdeploy.engines.{name}.exporter")
        parameters = inspect.signature(getattr(exporter, function)).parameters
        assert set(ENGINES[name].options) == parameters.keys() - GIVEN, name
        assert parameters["precision"].default == ENGINES[name].precisions[0]
    assert [engine.name for engine in list_exporting()] == list(EXPORTERS)


def test_engines_are_listed_without_loading_any():
    heavy = ("torch", "transformers", "onnx", "onnxruntime", "tensorrt", "numpy")
    code = (
        "import sys; from lpdeploy.engines import ENGINES\n"
        f"print(sorted(ENGINES), sorted(set(sys.modules) & set({heavy})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "['onnx', 'ort', 'torch', 'trt'] []\n"


def test_an_unknown_engine_is_refused():
    with pytest.raises(ValueError, match="'tvm'; it must be one of torch, onnx, ort, trt"):
        get_engine("tvm")


def test_torch_exports_nothing(tmp_path):
    model = make_tiny_model(tmp_path / "model", num_hidden_layers=1)
    with pytest.raises(ValueError, match="torch runs checkpoints as they are"):
        export(str(model), engine="torch")


def test_every_unknown_option_and_precision_is_refused():
    for engine in list_exporting():
        with pytest.raises(LpdeployError, match=f"`nothing` is no option of engine {engine.name}"):
            engine.check_options({"precision": "fp32", "nothing": 1})
        with pytest.raises(LpdeployError, match=f"`precision` fp3 .* by engine {engine.name}"):
            engine.check_options({"precision": "fp3"})
        for precision in engine.precisions:
            engine.check_options(dict.fromkeys(engine.options) | {"precision": precision})


def test_a_gpu_is_asked_for_before_a_library():
    for engine in ENGINES.values():
        if engine.needs_gpu:
            with pytest.raises(LpdeployError, match="needs an NVIDIA GPU, and the device is cpu"):
                engine.check("cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    base = make_tiny_model(folder / "base", heads=4, num_hidden_layers=1)
    options = PruneConfig(
        steps=1, batch_size=2, micro_batch_size=2, seq_len=16, round_to=4, device="cpu"
    )
    text = make_text(folder / "text.txt")
    prune(str(base), folder / "run", data=str(text), options=options)
    compact(folder / "run")
    return folder / "run", text


def invoke(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def read_json(result):
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
def test_an_engine_from_outside_runs_the_line(made, monkeypatch):
    run, text = made
    refused = invoke("export", run, "--engine", "toy")
    assert (refused.exit_code, "'toy' is not one of" in refused.stderr) == (2, True)
    monkeypatch.setitem(ENGINES, "toy", TOY)

    exported = read_json(invoke("export", run, "--engine", "toy", "--max-batch", "2", "--json"))
    assert (exported["engine"], exported["max_batch"]) == ("toy", 2)
    assert exported["output"] == str(run / "toy")
    compared = read_json(invoke("verify", run, "--engine", "toy", "--json"))["pairs"][-1]
    assert (compared["a"], compared["b"], compared["ok"]) == ("compact/torch", "toy", True)
    words = ("eval", run, "--engine", "toy", "--perplexity", text, "--seq-len", "16", "--json")
    assert read_json(invoke(*words))["engine"] == "toy"
    # Each engine in a process of its own, which has never heard of the test.
    words = ("--merged", "--tokens", "8", "--repeats", "1", "--device", "cpu", "--json")
    timed = read_json(invoke("bench", "latency", run, "--engine", "torch,toy", *words))
    assert [row["engine"] for row in timed["rows"]] == ["torch", "torch", "toy", "toy"]
    pushed = read_json(invoke("push", run, "--repo", "me/toy", "--json"))
    assert "toy/model.safetensors" in {file["path"] for file in pushed["files"]}


def test_an_engine_from_outside_refuses_what_it_does_not_know(made, monkeypatch, tmp_path):
    run, _ = made
    monkeypatch.setitem(ENGINES, "toy", TOY)
    to = ("--output", tmp_path / "out")
    for words, sentence in {
        ("--opset", 18): "--opset is no option of engine toy. Leave it out.",
        ("--precision", "int4"): "--precision int4 is not supported by engine toy. Use fp32, bf16.",
    }.items():
        result = invoke("export", run, "--engine", "toy", *words, *to)
        assert (result.exit_code, result.stderr.splitlines()[-1]) == (2, f"Error: {sentence}")
    result = invoke("package", run, "--target", "triton", "--engine", "toy", *to)
    assert (result.exit_code, "'toy' is not one of 'ort', 'trt'" in result.stderr) == (2, True)
    assert not (tmp_path / "out").exists()
