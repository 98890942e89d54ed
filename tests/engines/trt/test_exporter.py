"""Engines that TensorRT-RTX really builds, without a GPU; and, with a fake, what it refuses."""

import importlib
import json
import re
import shutil
from dataclasses import replace

import onnx
import pytest
import torch
from click.testing import CliRunner

from lpdeploy.artifacts import compute_sha256
from lpdeploy.cli.main import main
from lpdeploy.engines import ONNX, TRT
from lpdeploy.engines.contract import load_contract
from lpdeploy.engines.trt import exporter as module
from lpdeploy.engines.trt.exporter import build_engine, build_profiles, export_tensorrt
from lpdeploy.engines.trt.library import load_library, wrap_module
from lpdeploy.engines.trt.runner import _load_engine, load_trt_runner
from lpdeploy.errors import ArtifactError, LpdeployError, MissingDependencyError
from lpdeploy.models.loading import compute_model_sha256
from tests import fake_tensorrt
from tests.helpers import EXPORTS, copy_export, list_names, make_export, make_tiny_model

pytestmark = pytest.mark.slow


def find_reason_to_skip():
    try:
        importlib.import_module("tensorrt_rtx")
    except ImportError as error:
        return f"no engine is built: {error}"
    return ""


REASON = find_reason_to_skip()
needs_rtx = pytest.mark.skipif(bool(REASON), reason=REASON or "tensorrt_rtx is here")
PROFILES = {
    cache: build_profiles(max_batch=4, max_seq_len=32, in_place=cache == "in-place")
    for cache in ("concat", "in-place")
}
both_caches = pytest.mark.parametrize("cache", PROFILES)


def build(library, graph, folder, *, cache="concat"):
    contract = load_contract(graph, ONNX)
    profiles = PROFILES[cache]
    build_engine(library, graph / "model.onnx", folder, contract=contract, profiles=profiles)
    return contract


def parse(library, graph):
    """Parse a graph here, not through the exporter."""
    builder = library.module.Builder(library.logger)
    network = library.create_network(builder)
    parser = library.module.OnnxParser(network, library.logger)
    assert parser.parse_from_file(str(graph / "model.onnx")), library.messages
    return builder, network, parser


@pytest.mark.trt
@needs_rtx
@both_caches
@pytest.mark.parametrize("name", EXPORTS)
def test_engines_are_built(name, cache, tmp_path):
    library = load_library("tensorrt_rtx")
    graph = make_export(name, in_place=cache == "in-place")[2]
    contract = build(library, graph, tmp_path, cache=cache)
    plan = (tmp_path / "model.engine").read_bytes()
    assert len(plan) > 10_000
    for item in contract.inputs + contract.outputs:
        assert item.name.encode() in plan
    assert library.messages == []


@pytest.mark.trt
@needs_rtx
@both_caches
@pytest.mark.parametrize("name", EXPORTS)
def test_networks_have_the_tensors_of_the_contract(name, cache):
    library = load_library("tensorrt_rtx")
    graph = make_export(name, in_place=cache == "in-place")[2]
    _, network, _parser = parse(library, graph)
    contract = load_contract(graph, ONNX)
    types = {
        "int64": library.module.DataType.INT64,
        "float32": library.module.DataType.FLOAT,
        "float16": library.module.DataType.HALF,
    }
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    for described, tensors in ((contract.inputs, inputs), (contract.outputs, outputs)):
        assert [item.name for item in described] == [tensor.name for tensor in tensors]
        assert [types[item.dtype] for item in described] == [t.dtype for t in tensors]
        for item, tensor in zip(described, tensors, strict=True):
            fixed = [-1 if isinstance(part, str) else part for part in item.shape]
            assert list(tensor.shape) == fixed
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    kind = library.module.LayerType.KV_CACHE_UPDATE
    updates = [layer for layer in layers if layer.type == kind]
    names = [item.name for item in contract.inputs[4:]] if cache == "in-place" else []
    # From a network input straight to a network output: the two are one memory.
    assert {(layer.get_input(0).name, layer.get_output(0).name) for layer in updates} == {
        (name, name.replace("past_key_values", "present")) for name in names
    }
    assert len(updates) == len(names)


@pytest.mark.trt
@needs_rtx
@pytest.mark.parametrize(("opset", "cache"), [(None, "in-place"), (23, "concat")])
def test_bf16_engine_is_built(opset, cache, tmp_path):
    model = make_tiny_model(tmp_path / "model", num_hidden_layers=1)
    contract = export_tensorrt(model, tmp_path / "trt", precision="bf16", opset=opset, max_batch=2)
    assert (contract.precision, contract.build.cache) == ("bf16", cache)
    assert contract.inputs[-1].dtype == "bfloat16"
    assert (tmp_path / "trt" / "timing.cache").stat().st_size > 0


@pytest.mark.trt
@needs_rtx
def test_the_command_builds_an_engine_that_says_what_it_needs(tmp_path):
    model = make_tiny_model(tmp_path / "model", kv_heads=2, num_hidden_layers=1)
    words = ["export", str(model), "--engine", "trt", "--max-batch", "2", "--json"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert re.search(r"by tensorrt_rtx [\d.]+, cache in-place", result.stderr)
    printed = json.loads(result.stdout)
    assert printed["compute_capability"] == "any"
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: it would run")
    with pytest.raises(LpdeployError, match="needs an NVIDIA GPU with its driver"):
        load_trt_runner(model / "trt")
    # What the library itself says, were it asked.
    with pytest.raises(
        ArtifactError, match=r"cannot load .*(?i:cuda).*Export it again with"
    ) as told:
        _load_engine(model / "trt", load_library("tensorrt_rtx"))
    assert "\n" not in str(told.value)


@pytest.mark.trt
@needs_rtx
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("model.onnx", "Failed to parse the ONNX model"),
        ("model.onnx.data", "external weights .* out of range for file: .*model.onnx.data"),
    ],
)
def test_a_truncated_graph(name, reason, tmp_path):
    graph = copy_export("odd-heads", tmp_path / "onnx")
    path = graph / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    sentence = rf"does not take this graph of opset 18: .*{reason}.*Try another `opset`"
    with pytest.raises(LpdeployError, match=sentence) as caught:
        build(load_library("tensorrt_rtx"), graph, tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "model.engine").exists()


@pytest.mark.trt
@needs_rtx
def test_an_operator_that_is_not_taken(tmp_path):
    graph = copy_export("odd-heads", tmp_path / "onnx")
    model = onnx.load(graph / "model.onnx", load_external_data=False)
    model.opset_import.append(onnx.helper.make_opsetid("elsewhere", 1))
    node = next(node for node in model.graph.node if node.op_type == "MatMul")
    node.op_type, node.domain = "Unheard", "elsewhere"
    onnx.save(model, graph / "model.onnx")
    with pytest.raises(LpdeployError, match=r"opset 18: Unheard: .*Plugin not found.*`opset`"):
        build(load_library("tensorrt_rtx"), graph, tmp_path)


@pytest.mark.trt
@needs_rtx
def test_a_profile_that_contradicts_itself(tmp_path, monkeypatch):
    profiles = build_profiles(max_batch=4, max_seq_len=32, in_place=False)
    profiles["decode"]["total"] = (40, 16, 32)
    monkeypatch.setitem(PROFILES, "concat", profiles)
    with pytest.raises(LpdeployError, match=r"cannot build the engine: .*Try a smaller `max_b"):
        build(load_library("tensorrt_rtx"), make_export("odd-heads")[2], tmp_path)


@pytest.mark.trt
@needs_rtx
def test_what_the_library_offers():
    library = load_library("tensorrt_rtx")
    assert library.takes_operator("TensorScatter")
    assert not library.takes_operator("Unheard")
    assert library.captures_graphs


@pytest.fixture
def fake(monkeypatch):
    """Make the fake library the one that is installed."""
    library = wrap_module("tensorrt_rtx", fake_tensorrt.make_module())
    monkeypatch.setattr(module, "load_library", lambda: library)
    return library


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trt") / "model"
    return make_tiny_model(folder, kv_heads=2, num_hidden_layers=1)


@pytest.fixture
def quick(monkeypatch, model_folder):
    """Take the shared graph for what export_onnx would write: an export takes seconds."""
    graph = make_export("odd-heads", in_place=True)[2]

    def copy(_, output, **__):
        shutil.copytree(graph, output)
        return replace(load_contract(graph, ONNX), max_seq_len=32)

    monkeypatch.setattr(module, "export_onnx", copy)


def test_an_exported_folder(model_folder, tmp_path, fake):
    output = tmp_path / "trt"
    contract = export_tensorrt(model_folder, output, max_batch=4, max_seq_len=32)
    assert set(list_names(output)) == {
        "config.json",
        "engine.json",
        "generation_config.json",
        "model.engine",
        "timing.cache",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    written = json.loads((output / "engine.json").read_text())
    assert (written["schema_version"], written["engine"]) == (1, "trt")
    assert written["library"] == {"name": "tensorrt_rtx", "version": "1.7.1.116"}
    assert written["compute_capability"] == "any"
    assert written["profiles"] == json.loads(json.dumps(PROFILES["in-place"]))
    assert (written["cache"], written["opset"]) == ("in-place", 24)
    assert load_contract(output, TRT) == contract
    assert contract.build.profiles == PROFILES["in-place"]
    assert (contract.precision, contract.merged) == ("fp32", True)
    assert contract.source.sha256 == compute_model_sha256(model_folder)
    assert contract.build.build_seconds >= 0
    engine = output / "model.engine"
    assert written["files"] == {
        "model.engine": {"bytes": engine.stat().st_size, "sha256": compute_sha256(engine)}
    }
    # What the builder was told: both profiles, in their order, and attention it may take apart.
    prefill, decode = fake_tensorrt.Builder.last.config.profiles
    assert prefill["input_ids"] == [[1, 2], [1, 16], [4, 32]]
    assert decode["input_ids"] == [[1, 1], [1, 1], [4, 1]]
    for profile in (prefill, decode):
        assert profile["attention_mask"] == [[1, 32], [1, 32], [4, 32]]
        assert profile["write_indices"] == [[1], [1], [4]]
        assert profile["past_key_values.0.key"] == [[1, 2, 32, 8], [1, 2, 32, 8], [4, 2, 32, 8]]
    assert prefill.keys() == decode.keys() == {item.name for item in contract.inputs}
    for layer in fake_tensorrt.Builder.last.network.layers:
        is_attention = layer.type == fake_tensorrt.LayerType.ATTENTION_INPUT
        assert layer.attention.decomposable == is_attention
        assert isinstance(layer, fake_tensorrt.IAttentionBoundaryLayer) == is_attention


@pytest.mark.parametrize(
    ("library", "opset"), [("older", None), ("newer", 23)], ids=["not-offered", "not-wanted"]
)
def test_a_cache_that_grows(library, opset, model_folder, tmp_path, fake, monkeypatch):
    if library == "older":
        monkeypatch.setattr(fake_tensorrt.OnnxParser, "unknown", ("TensorScatter",))
    contract = export_tensorrt(
        model_folder, tmp_path / "trt", max_batch=4, max_seq_len=32, opset=opset
    )
    assert (contract.build.cache, contract.opset) == ("concat", 23)
    prefill, decode = fake_tensorrt.Builder.last.config.profiles
    assert prefill["input_ids"] == [[1, 1], [1, 16], [4, 32]]
    assert prefill["past_key_values.0.key"] == [[1, 2, 0, 8], [1, 2, 0, 8], [4, 2, 0, 8]]
    assert decode["input_ids"] == [[1, 1], [1, 1], [4, 1]]
    assert decode["attention_mask"] == [[1, 2], [1, 16], [4, 32]]
    assert decode["past_key_values.0.value"] == [[1, 2, 1, 8], [1, 2, 15, 8], [4, 2, 31, 8]]


@both_caches
@pytest.mark.parametrize("max_seq_len", [2, 3, 32, 2048])
def test_sizes_of_profiles_agree(cache, max_seq_len):
    profiles = build_profiles(max_batch=4, max_seq_len=max_seq_len, in_place=cache == "in-place")
    for sizes in profiles.values():
        assert all(low <= usual <= high for low, usual, high in sizes.values())
        for rank in (0, 1):
            assert sizes["total"][rank] == sizes["past"][rank] + sizes["sequence"][rank]
        assert sizes["total"][2] == max_seq_len


def test_a_timing_cache_is_used_again(model_folder, tmp_path, fake, quick):
    output = tmp_path / "trt"
    export_tensorrt(model_folder, output)
    assert (output / "timing.cache").read_bytes() == b"measured "
    export_tensorrt(model_folder, output, overwrite=True)
    assert (output / "timing.cache").read_bytes() == b"measured measured "
    (output / "timing.cache").write_bytes(b"of another version")
    export_tensorrt(model_folder, output, overwrite=True)
    assert (output / "timing.cache").read_bytes() == b"measured "


def test_a_library_that_measures_nothing(model_folder, tmp_path, fake, quick, monkeypatch):
    monkeypatch.delattr(fake_tensorrt.Config, "create_timing_cache")
    export_tensorrt(model_folder, tmp_path / "trt")
    assert not (tmp_path / "trt" / "timing.cache").exists()


def test_a_graph_that_the_library_does_not_take(tmp_path, fake):
    graph = copy_export("odd-heads", tmp_path / "onnx")
    (graph / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(
        LpdeployError,
        match=r"tensorrt_rtx 1.7.1.116 does not take this graph of opset 18: .*Try another `opset`",
    ):
        build(fake, graph, tmp_path)


def test_a_failed_build_leaves_nothing(model_folder, tmp_path, fake, quick, monkeypatch):
    monkeypatch.setattr(fake_tensorrt.Builder, "fails", True)
    with pytest.raises(
        LpdeployError,
        match=r"cannot build the engine: Could not find any implementation. Try a smaller `max_b",
    ):
        export_tensorrt(model_folder, tmp_path / "trt")
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_it_in_a_sentence(model_folder, tmp_path, fake, quick, monkeypatch):
    monkeypatch.setattr(fake_tensorrt.Builder, "fails", True)
    words = ["export", str(model_folder), "--engine", "trt", "--output", str(tmp_path / "trt")]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1
    assert re.fullmatch(r"Error: tensorrt_rtx 1.7.1.116 cannot build .*\n", result.stderr)
    assert list(tmp_path.iterdir()) == []


def test_output_in_the_way(model_folder, tmp_path, fake, quick):
    export_tensorrt(model_folder, tmp_path / "trt")
    with pytest.raises(ArtifactError, match="already exists"):
        export_tensorrt(model_folder, tmp_path / "trt")


def test_options_are_those_of_the_graph(model_folder, tmp_path, fake, monkeypatch):
    with pytest.raises(LpdeployError, match="`opset` 25 is not .* in place; it must be 24"):
        export_tensorrt(model_folder, tmp_path / "trt", opset=25)
    with pytest.raises(LpdeployError, match="`opset` 17 is not supported; it must be 18 to 23"):
        export_tensorrt(model_folder, tmp_path / "trt", opset=17)
    monkeypatch.setattr(fake_tensorrt.OnnxParser, "unknown", ("TensorScatter",))
    with pytest.raises(LpdeployError, match="`opset` 24 is not supported; it must be 18 to 23"):
        export_tensorrt(model_folder, tmp_path / "trt", opset=24)
    with pytest.raises(LpdeployError, match="`max_seq_len` 129 does not fit"):
        export_tensorrt(model_folder, tmp_path / "trt", max_seq_len=129)
    assert list(tmp_path.iterdir()) == []


def test_no_library_is_said_before_the_graph_is_made(model_folder, tmp_path, monkeypatch):
    def refuse():
        raise MissingDependencyError("TensorRT is not installed")

    monkeypatch.setattr(module, "load_library", refuse)
    monkeypatch.setattr(module, "export_onnx", lambda *_, **__: pytest.fail("a graph was made"))
    with pytest.raises(MissingDependencyError):
        export_tensorrt(model_folder, tmp_path / "trt")


def test_tensorrt_builds_on_the_gpu_that_runs(monkeypatch):
    library = wrap_module("tensorrt", fake_tensorrt.make_module("11.0.0"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LpdeployError, match=r"tensorrt 11.0.0 builds .*lpdeploy\[trt-rtx\]"):
        module.find_compute_capability(library)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert module.find_compute_capability(library) == "9.0"
