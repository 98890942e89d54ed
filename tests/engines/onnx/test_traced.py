"""What is traced: a cache in place, and masks without an empty row."""

import json

import onnx
import pytest
import torch
from transformers import DynamicCache
from transformers.masking_utils import create_masks_for_generate

from lpdeploy.engines.onnx import traced
from lpdeploy.engines.onnx.exporter import export_onnx
from lpdeploy.errors import LpdeployError
from lpdeploy.models.loading import load_model
from tests.helpers import EXPORTS, make_batch, make_export, make_tiny_model

pytestmark = pytest.mark.slow


def list_dims(value):
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize("name", EXPORTS)
def test_a_graph_over_buffers(name):
    folder = make_export(name, in_place=True)[2]
    contract = json.loads((folder / "io.json").read_text())
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    graph = model.graph
    assert {item.domain: item.version for item in model.opset_import} == {"": 24}
    for described, values in (
        (contract["inputs"], graph.input),
        (contract["outputs"], graph.output),
    ):
        assert [item["name"] for item in described] == [value.name for value in values]
        assert [item["shape"] for item in described] == [list_dims(value) for value in values]
    assert [item["name"] for item in contract["inputs"][:4]] == [
        "input_ids",
        "attention_mask",
        "position_ids",
        "write_indices",
    ]
    assert contract["inputs"][1]["shape"] == ["batch", 32]
    # The buffer goes in, is written, and is attended to: nothing is concatenated on the way.
    caches = [item["name"] for item in contract["inputs"][4:]]
    scatters = [list(node.input) for node in graph.node if node.op_type == "TensorScatter"]
    assert sorted(inputs[0] for inputs in scatters) == sorted(caches)
    assert {inputs[2] for inputs in scatters} == {"write_indices"}
    attentions = [node for node in graph.node if node.op_type == "Attention"]
    assert len(attentions) == contract["num_hidden_layers"]
    for layer, node in enumerate(attentions):
        assert node.input[1:3] == [f"present.{layer}.key", f"present.{layer}.value"]


def test_an_opset_without_buffers(tmp_path):
    model = make_tiny_model(tmp_path / "model", num_hidden_layers=1)
    with pytest.raises(LpdeployError, match=r"`opset` 23 is not .* in place; it must be 24"):
        export_onnx(model, tmp_path / "onnx", in_place=True, opset=23)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "mistral", "sliding_window": 3},
        {
            "model_type": "qwen2",
            "use_sliding_window": True,
            "sliding_window": 3,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ],
    ids=["llama", "window", "two-kinds"],
)
def test_padding_sees_itself_and_nothing_else_changes(config, tmp_path):
    model = load_model(make_tiny_model(tmp_path / "model", **config))
    ids, padding = make_batch([6, 2], vocab_size=64)
    positions = (padding.cumsum(1) - 1).clamp_min(0)
    cache = DynamicCache()
    masks = traced._build_masks(model, ids, padding, positions, cache)
    expected = create_masks_for_generate(
        model.config, model.get_input_embeddings()(ids), padding, cache, positions
    )
    if not isinstance(masks, dict):
        masks, expected = {"all": masks}, {"all": expected}
    assert masks.keys() == expected.keys()
    for kind, mask in masks.items():
        real = padding.bool()
        assert torch.equal(mask[:, 0][real], expected[kind][:, 0][real])
        assert torch.equal(mask[:, 0][~real], torch.eye(6).bool().expand(2, 6, 6)[~real])
