"""The model repository: what is in it, and what is refused."""

import json
import re
import socket

import onnx
import pytest
from click.testing import CliRunner

from lpdeploy.cli.main import main
from lpdeploy.engines.export import export
from lpdeploy.errors import LpdeployError
from lpdeploy.servers.package import package
from tests.helpers import make_tiny_model
from tools.servers import triton_server


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("triton") / "model", head_dim=16, kv_heads=2)


@pytest.fixture(scope="module")
def repository(model):
    folder = model.parent / "repository"
    package(str(model), kind="triton", output=folder, name="tiny", max_batch=4, max_seq_len=64)
    return folder


def test_what_is_in_it(repository):
    names = {path.name for path in repository.iterdir()}
    assert names >= {"README.md", "tiny", "tiny_whole", "tiny_engine", "lpdeploy-package.json"}
    contract = json.loads((repository / "tiny_engine" / "1" / "io.json").read_text())
    assert (contract["max_batch"], contract["max_seq_len"]) == (4, 64)


def test_models_find_their_code(repository):
    for name, module in (("tiny", "text_model"), ("tiny_whole", "whole_model")):
        text = (repository / name / "1" / "model.py").read_text()
        source, cls = re.search(r"from (\S+) import (\w+) as TritonPythonModel", text).groups()
        assert source == f"lpdeploy.servers.triton.{module}"
        assert hasattr(__import__(source, fromlist=[cls]), cls)


def test_tensors_of_the_engine_are_those_of_its_graph(repository):
    graph = onnx.load(repository / "tiny_engine/1/model.onnx", load_external_data=False).graph
    config = (repository / "tiny_engine" / "config.pbtxt").read_text()
    described = dict(
        re.findall(r'name: "(\S+)" data_type: (\S+ dims: \[.*?\](?: reshape \{.*?\})?)', config)
    )
    types = {1: "TYPE_FP32", 6: "TYPE_INT32", 7: "TYPE_INT64"}
    expected = {}
    for value in [*graph.input, *graph.output]:
        tensor = value.type.tensor_type
        dims = [dim.dim_value or -1 for dim in tensor.shape.dim]
        shape = f"dims: {dims}" if dims else "dims: [1] reshape { shape: [ ] }"
        expected[value.name] = f"{types[tensor.elem_type]} {shape}"
    assert described == expected


def test_an_export_that_is_there_is_taken_over(model):
    export(str(model), engine="ort", max_batch=2)
    output = model.parent / "second"
    result = package(str(model), kind="triton", output=output).to_json()
    assert (result["exported"], result["max_batch"], result["name"]) == (False, 2, "second")
    linked = output / "second_engine" / "1" / "model.onnx.data"
    assert linked.samefile(model / "ort" / "model.onnx.data")
    result = package(
        str(model), kind="triton", output=output, max_batch=3, overwrite=True
    ).to_json()
    assert (result["exported"], result["max_batch"]) == (True, 3)


def test_an_export_in_another_precision_is_not_taken_unasked(model):
    output = model.parent / "third"
    export(str(model), engine="ort", precision="int8", block_size=16, overwrite=True)
    result = package(str(model), kind="triton", output=output).to_json()
    assert (result["exported"], result["precision"]) == (True, "fp32")
    asked = {"precision": "int8", "overwrite": True}
    result = package(str(model), kind="triton", output=output, **asked).to_json()
    assert (result["exported"], result["precision"]) == (False, "int8")


def test_gpus_are_written_down(model):
    output = model.parent / "gpus"
    package(str(model), kind="triton", output=output, gpu=(0, 2))
    for name in ("gpus", "gpus_engine"):
        config = (output / name / "config.pbtxt").read_text()
        assert "instance_group [ { count: 1 kind: KIND_GPU gpus: [0, 2] } ]" in config
    assert "--gpus all" in (output / "README.md").read_text()


def run(*words):
    result = CliRunner().invoke(main, ["package", *map(str, words)])
    return result.exit_code, result.stderr


@pytest.mark.parametrize(
    ("words", "expected", "sentence"),
    [
        (["--name", "a b"], 2, "'a b' is not a valid model name for Triton"),
        (["--tensor-parallel", "2"], 2, "--tensor-parallel is not an option of --target triton"),
        (["--max-seq-len", "9999"], 1, "--max-seq-len 9999 does not fit a model of 128 positions"),
    ],
)
def test_what_is_refused_leaves_nothing(model, tmp_path, words, expected, sentence):
    output = tmp_path / "repository"
    code, said = run(model, "--target", "triton", "--output", output, *words)
    assert (code, said.count("\n")) == (expected, 1)
    assert sentence in said
    assert not list(tmp_path.iterdir())


def test_a_repository_that_exists(model, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    for words in ([], ["--overwrite"]):
        code, said = run(model, "--target", "triton", "--output", tmp_path / "mine", *words)
        assert code == 1
        assert "mine" in said
        assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_a_model_without_a_tokenizer(model, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((model / name).read_bytes())
    code, said = run(bare, "--target", "triton", "--output", tmp_path / "repository")
    assert code == 1
    assert "has no tokenizer" in said


def test_a_port_in_use():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(LpdeployError, match=f"Port {port} cannot be used"):
            triton_server.check_ports(port)


@pytest.fixture
def server(tmp_path):
    for name in ("python", "identity"):
        (tmp_path / "server" / "backends" / name).mkdir(parents=True)
    return tmp_path / "server"


def test_which_models_are_loaded(repository, server):
    options = triton_server.list_options(repository, [], server)
    assert options == [
        "--model-control-mode=explicit", "--load-model=tiny", "--load-model=tiny_whole",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        ("tiny_engine", "'tiny_engine' needs the backend 'onnxruntime', .* only identity, python"),
        ("other", "has no model 'other'"),
    ],
)
def test_models_that_cannot_be_loaded(repository, server, extra, sentence):
    with pytest.raises(LpdeployError, match=sentence):
        triton_server.list_options(repository, [extra], server)


def test_a_folder_that_is_no_repository(model, tmp_path, server):
    with pytest.raises(LpdeployError, match="--target triton"):
        triton_server.list_options(tmp_path, [], server)
    package(str(model), kind="vllm", output=tmp_path / "vllm")
    with pytest.raises(LpdeployError, match="is for vllm"):
        triton_server.list_options(tmp_path / "vllm", [], server)
