"""Configs of a model repository against Triton's own schema, in the protobuf of its client."""

import json
import subprocess

import pytest

from lpdeploy.engines import ENGINES
from lpdeploy.engines.contract import load_contract
from lpdeploy.engines.export import export
from lpdeploy.servers.package import package
from tests.helpers import make_tiny_model
from tools.servers import triton_server

pytestmark = pytest.mark.slow

# The names of dimensions and types are the client's, not ours.
PARSE = """
import json, sys
from google.protobuf import json_format, text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig
text = sys.stdin.read()
print(json_format.MessageToJson(text_format.Parse(text, ModelConfig()), preserving_proto_field_name=True))
"""  # noqa: E501
TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
}


def parse(text):
    triton_server.setup()
    python = triton_server.VENV / "bin" / "python"
    done = subprocess.run(
        [python, "-c", PARSE], input=text, capture_output=True, text=True, check=False
    )
    return json.loads(done.stdout) if done.returncode == 0 else done.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("configs") / "model", head_dim=16, kv_heads=2)


@pytest.fixture(scope="module", params=["ort", "ort on GPUs", "trt"])
def repository(request, model):
    folder = model.parent / request.param.replace(" ", "-")
    options = {"max_batch": 4, "max_seq_len": 32, "name": "tiny"}
    if request.param == "trt":
        pytest.importorskip("tensorrt_rtx", reason="no engine is built without TensorRT-RTX")
        # A cache that is concatenated, since Triton's backend cannot have one in place.
        export(str(model), engine="trt", opset=20, max_batch=4, max_seq_len=32)
        options["engine"] = "trt"
    elif request.param == "ort on GPUs":
        options["gpu"] = (0, 2)
    package(str(model), kind="triton", output=folder, **options)
    return request.param, folder


def test_every_config_is_one_of_triton(repository):
    kind, folder = repository
    configs = {path.parent.name: parse(path.read_text()) for path in folder.glob("*/config.pbtxt")}
    assert configs.keys() == {"tiny", "tiny_whole", "tiny_engine"}
    for name, config in configs.items():
        assert isinstance(config, dict), config  # else what the parser says
        assert config["name"] == name
    gpus = {"ort": [], "ort on GPUs": [0, 2], "trt": [0]}[kind]
    for name in ("tiny", "tiny_engine"):
        (group,) = configs[name]["instance_group"]
        assert group["kind"] == ("KIND_GPU" if gpus else "KIND_CPU")
        assert group.get("gpus", []) == gpus
    (group,) = configs["tiny_whole"]["instance_group"]  # it only passes requests on
    assert group["kind"] == "KIND_CPU"
    for name in ("tiny", "tiny_whole"):
        assert configs[name]["backend"] == "python"


def test_the_engine_has_the_tensors_of_its_contract(repository):
    kind, folder = repository
    engine = ENGINES[kind.split()[0]]
    config = parse((folder / "tiny_engine" / "config.pbtxt").read_text())
    contract = load_contract(folder / "tiny_engine" / "1", engine)
    rows = contract.max_batch if engine.triton.batches else 0
    assert config["backend"] == engine.triton.name
    assert config["default_model_filename"] == engine.main_file
    assert (folder / "tiny_engine" / "1" / engine.main_file).is_file()
    assert config.get("max_batch_size", 0) == rows
    for described, tensors in (
        (config["input"], contract.inputs),
        (config["output"], contract.outputs),
    ):
        assert [item["name"] for item in described] == [tensor.name for tensor in tensors]
        for item, tensor in zip(described, tensors, strict=True):
            assert item["data_type"] == TYPES[tensor.dtype]
            shape = tensor.shape[1 if rows else 0 :]
            dims = [str(n) if isinstance(n, int) else "-1" for n in shape]
            assert item["dims"] == (dims or ["1"])
            assert ("reshape" in item) == (not dims)
    if kind == "trt":
        (group,) = config["instance_group"]
        assert group["profile"] == ["0", "1"]


def test_what_is_no_config_is_not_taken():
    assert parse('name: "a" backend: "python"') == {"name": "a", "backend": "python"}
    assert "no field named" in parse('name: "a" backends: "python"')
    assert "TYPE_FLOAT" in parse('input [ { name: "a" data_type: TYPE_FLOAT dims: [ 1 ] } ]')
