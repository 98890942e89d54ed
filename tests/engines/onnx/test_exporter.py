"""The exported graph against transformers, its contract, and what it refuses."""

import json
import os
from collections import Counter

import onnx
import pytest
import torch
from onnx import TensorProto
from transformers import AutoTokenizer

from lpdeploy.engines.onnx import exporter as module
from lpdeploy.engines.onnx.exporter import export_onnx
from lpdeploy.engines.onnx.runner import load_onnx_runner
from lpdeploy.engines.torch.runner import load_torch_runner
from lpdeploy.errors import ArtifactError, LpdeployError
from lpdeploy.models.adapters import load_unmerged
from lpdeploy.models.loading import compute_model_sha256, load_config, load_model
from lpdeploy.models.shapes import count_parameters, list_widths
from tests.helpers import (
    EXPORTS,
    compute_reference,
    list_names,
    make_batch,
    make_export,
    make_tiny_model,
    run_with_cache,
)

pytestmark = pytest.mark.slow

# Sums of up to 48 products in another order, over two layers, up to logits of 10: some ten times
# the float32 rounding unit of that size, 1e-6.
ATOL = 2e-5
# The same for 11 bits: a rounding unit of 4e-3 at logits up to 10.
ATOL_FP16 = 4e-2


@pytest.fixture(scope="module", params=EXPORTS)
def exported(request):
    return request.param, *make_export(request.param)


def load_graph(folder):
    return onnx.load(folder / "model.onnx")


def list_dims(value):
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


# The first is what was traced, with other sizes; then one row, no padding, one token at a time
# from an empty cache; then several tokens after a past.
@pytest.mark.parametrize(
    ("lengths", "chunks"),
    [([9, 4, 11], [7, 1, 1, 1, 1]), ([5], [1, 1, 1, 1, 1]), ([13, 13, 2, 6], [10, 3])],
    ids=["padded", "one-row", "chunks"],
)
def test_logits_equal_transformers(exported, lengths, chunks):
    name, model_folder, adapter, folder = exported
    precision = EXPORTS[name][1].get("precision", "fp32")
    model = load_model(model_folder)
    if adapter is not None:
        model = load_unmerged(model, adapter)
    runner = load_onnx_runner(folder)
    ids, mask = make_batch(lengths, vocab_size=runner.vocab_size)
    logits = run_with_cache(runner, ids, mask, chunks=chunks)
    expected = compute_reference(model, ids, mask)[mask.bool()]
    assert expected.abs().max() > 2
    atol = ATOL if precision == "fp32" else ATOL_FP16
    torch.testing.assert_close(logits, expected, atol=atol, rtol=0)


def test_contract_is_what_the_graph_says(exported):
    _, model_folder, _, folder = exported
    contract = json.loads((folder / "io.json").read_text())
    graph = load_graph(folder).graph
    types = {
        "int64": TensorProto.INT64,
        "float32": TensorProto.FLOAT,
        "float16": TensorProto.FLOAT16,
    }
    for described, values in (
        (contract["inputs"], graph.input),
        (contract["outputs"], graph.output),
    ):
        assert [item["name"] for item in described] == [value.name for value in values]
        assert [item["shape"] for item in described] == [list_dims(value) for value in values]
        assert [types[item["dtype"]] for item in described] == [
            value.type.tensor_type.elem_type for value in values
        ]
    config = load_config(model_folder)
    assert contract["num_key_value_heads"] == [w.kv_heads for w in list_widths(config)]
    assert contract["head_dim"] == 8
    assert contract["max_positions"] == contract["max_seq_len"] == 128  # 2,048 is more than it has
    assert contract["max_batch"] == 8
    assert (contract["bos_token_id"], contract["eos_token_ids"]) == (1, [2])
    assert contract["source"]["sha256"] == compute_model_sha256(model_folder)


def test_opset_is_the_one_asked_for(exported):
    name, _, _, folder = exported
    operators = Counter(node.op_type for node in load_graph(folder).graph.node)
    opset = EXPORTS[name][1].get("opset", 23)
    assert {item.domain: item.version for item in load_graph(folder).opset_import} == {"": opset}
    # One operator a layer, straight on the cache: grouped heads are not repeated before it.
    attentions = [node for node in load_graph(folder).graph.node if node.op_type == "Attention"]
    layers = json.loads((folder / "io.json").read_text())["num_hidden_layers"]
    assert len(attentions) == (layers if opset == 23 else 0)
    for layer, node in enumerate(attentions):
        assert node.input[1:3] == [f"present.{layer}.key", f"present.{layer}.value"]
    assert operators["RMSNormalization"] == 0 or opset == 23


def test_folder_needs_nothing_else(exported):
    _, model_folder, adapter, folder = exported
    assert set(list_names(folder)) == {
        "config.json",
        "generation_config.json",
        "io.json",
        "model.onnx",
        "model.onnx.data",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    tokens = [
        AutoTokenizer.from_pretrained(f)("w0 w1")["input_ids"] for f in (model_folder, folder)
    ]
    assert tokens[0] == tokens[1]
    contract = json.loads((folder / "io.json").read_text())
    assert contract["merged"] == (adapter is None) == (contract["source"]["adapter_sha256"] is None)
    for name, recorded in contract["files"].items():
        assert recorded["bytes"] == (folder / name).stat().st_size
    # Only a graph: no weights, no stack traces with paths of the machine that exported.
    content = (folder / "model.onnx").read_bytes()
    assert len(content) < 60_000
    assert b"site-packages" not in content


def test_lora_stays_separate():
    model_folder, adapter, folder = make_export("unmerged")
    products = Counter(node.op_type for node in load_graph(folder).graph.node)["MatMul"]
    assert products == 7 * 3 + 1  # seven projections, A and B beside each, and the LM head
    ids, mask = make_batch([6], vocab_size=72)
    logits = load_onnx_runner(folder).forward(ids, attention_mask=mask).logits
    base = compute_reference(load_model(model_folder), ids, mask)
    assert (logits - base).abs().max() > 0.1
    unmerged = load_torch_runner(model_folder, adapter=adapter)
    expected = unmerged.forward(ids, attention_mask=mask).logits
    torch.testing.assert_close(logits, expected, atol=ATOL, rtol=0)


def test_tied_embeddings_are_stored_once():
    model_folder, _, folder = make_export("per-layer")
    weights = 4 * count_parameters(load_config(model_folder))
    # Norms are in the graph itself, tensors are aligned; a second embedding would add 38 kB.
    stored = (folder / "model.onnx.data").stat().st_size
    assert stored == pytest.approx(weights, abs=8_000)


def check_half(folder, half):
    """All weights, the cache and the products are half precision; logits are float32."""
    graph = load_graph(folder).graph
    # Rotary frequencies, a vector, stay float32 as in transformers.
    matrices = [item for item in graph.initializer if len(item.dims) > 1]
    assert matrices
    assert {item.data_type for item in matrices} == {half}
    caches = [*graph.input[3:], *graph.output[1:]]
    assert {value.type.tensor_type.elem_type for value in caches} == {half}
    assert graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    products = [node for node in graph.node if node.op_type in ("MatMul", "Attention")]
    assert {types.get(node.output[0], half) for node in products} == {half}


def test_fp16_is_fp16_throughout():
    check_half(make_export("fp16")[2], TensorProto.FLOAT16)


def test_bf16_exports_without_a_word(tmp_path, capfd):
    model = make_tiny_model(tmp_path / "model", num_hidden_layers=1)
    load_model(model, dtype="bf16").save_pretrained(model)
    capfd.readouterr()
    contract = export_onnx(
        model, tmp_path / "onnx", precision="bf16", opset=20, max_batch=2, max_seq_len=64
    )
    assert capfd.readouterr() == ("", "")
    check_half(tmp_path / "onnx", TensorProto.BFLOAT16)
    assert (contract.precision, contract.opset) == ("bf16", 20)
    assert (contract.max_batch, contract.max_seq_len) == (2, 64)
    with pytest.raises(ArtifactError, match="Use `device=.cuda.`"):
        load_onnx_runner(tmp_path / "onnx")


@pytest.fixture
def model_folder(tmp_path):
    return make_tiny_model(tmp_path / "model")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"opset": 17}, r"`opset` 17 is not supported; it must be 18 to 23. Leave it out for 23"),
        ({"opset": 24}, r"`opset` 24 is not supported"),
        ({"precision": "int8"}, r"`precision` int8 .*Use fp32, fp16, bf16"),
        ({"max_batch": 0}, r"`max_batch` is 0; it must be from 1 to"),
        ({"max_seq_len": 129}, r"`max_seq_len` 129 .*128 positions. Use 2 to 128"),
        ({"max_seq_len": 1}, r"`max_seq_len` 1 "),
    ],
)
def test_options_out_of_range(model_folder, tmp_path, options, sentence):
    with pytest.raises(LpdeployError, match=sentence):
        export_onnx(model_folder, tmp_path / "onnx", **options)
    assert not (tmp_path / "onnx").exists()


def test_an_opset_the_exporter_did_not_reach():
    graph = make_export("per-layer")[2] / "model.onnx"
    with pytest.raises(LpdeployError, match=r"wrote opset 23 .* to 20. Leave `opset` out"):
        module._check_graph(graph, opset=20)


def test_output_in_the_way(model_folder, tmp_path):
    (tmp_path / "onnx").mkdir()
    with pytest.raises(ArtifactError, match="already exists"):
        export_onnx(model_folder, tmp_path / "onnx")


def test_a_failed_export_leaves_nothing(model_folder, tmp_path, monkeypatch):
    def fail(model, path, **_):
        path.write_bytes(b"half a graph")
        raise OSError("no space left on device")

    monkeypatch.setattr(module, "_save_graph", fail)
    with pytest.raises(OSError, match="no space"):
        export_onnx(model_folder, tmp_path / "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_switch_for_grouped_attention_is_put_back(monkeypatch):
    name = "TRANSFORMERS_SDPA_FORCE_GQA"
    for before in (None, "0"):
        monkeypatch.delenv(name, raising=False)
        if before is not None:
            monkeypatch.setenv(name, before)
        with module._grouped_attention(enabled=True):
            assert os.environ[name] == "1"
        assert os.environ.get(name) == before
