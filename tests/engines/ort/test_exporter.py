"""The graph of ONNX Runtime's own operators against transformers, and what it refuses."""

import json
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file

from lpdeploy.engines.export import export
from lpdeploy.engines.ort.exporter import export_ort
from lpdeploy.engines.ort.graph import OPSET
from lpdeploy.engines.ort.runner import load_ort_runner
from lpdeploy.engines.ort.stored_weights import check_weights
from lpdeploy.errors import ArtifactError, LpdeployError
from lpdeploy.models.adapters import load_unmerged
from lpdeploy.models.loading import load_config, load_model
from lpdeploy.models.shapes import list_widths
from tests.helpers import (
    compute_reference,
    make_adapter,
    make_batch,
    make_tiny_model,
    run_with_cache,
)

# As in test_onnx.py: some ten float32 rounding units at logits of 10, over two layers; and the
# same for the 11 bits of fp16.
ATOL = {"fp32": 2e-5, "fp16": 4e-2}

# name -> (model, options of export_ort). GroupQueryAttention wants heads of a multiple of 16.
MODELS = {
    "per-layer": (
        {
            "model_type": "lpdeploy_mistral",
            "heads": 12,
            "kv_heads": 4,
            "layer_widths": [[3, 40], [1, 24]],
            "tie_word_embeddings": True,
        },
        {},
    ),
    "odd-heads-window": ({"model_type": "mistral", "heads": 3, "sliding_window": 6}, {}),
    "unmerged-biases": ({"model_type": "qwen2", "kv_heads": 2}, {}),
    "head-norms-fp16": ({"model_type": "qwen3", "kv_heads": 2}, {"precision": "fp16"}),
    "scaled-rotary": (
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
        {},
    ),
}


def make_model(folder, **config):
    return make_tiny_model(folder, head_dim=16, **config)


def load_reference(model_folder, adapter, precision):
    model = load_model(model_folder, dtype="fp32")
    if precision == "fp16":  # the weights as the graph has them, computed with in full precision
        for parameter in model.parameters():
            parameter.data = parameter.data.half().float()
    return model if adapter is None else load_unmerged(model, adapter)


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tmp_path_factory):
    config, options = MODELS[request.param]
    root = tmp_path_factory.mktemp(request.param)
    model = make_model(root / "model", **config)
    adapter = make_adapter(model, root / "adapter") if "unmerged" in request.param else None
    export_ort(model, root / "ort", adapter=adapter, **options)
    return load_reference(model, adapter, options.get("precision", "fp32")), root / "ort"


def load_graph(folder):
    return onnx.load(folder / "model.onnx")


def count_operators(folder):
    return Counter(node.op_type for node in load_graph(folder).graph.node)


# One pass; then tokens one by one through the cache; then chunks whose first holds a row that has
# not begun, and rows of different lengths; then a single row.
@pytest.mark.parametrize(
    ("lengths", "chunks"),
    [
        ([9, 4, 11], [11]),
        ([9, 4, 11], [7, 1, 1, 1, 1]),
        ([13, 13, 2, 6], [10, 3]),
        ([5], [1] * 5),
        ([8], [3, 5]),
    ],
    ids=["prefill", "decode", "chunks", "one-row", "one-row-chunks"],
)
def test_logits_equal_transformers(exported, lengths, chunks):
    model, folder = exported
    runner = load_ort_runner(folder)
    ids, mask = make_batch(lengths, vocab_size=model.config.vocab_size)
    logits = run_with_cache(runner, ids, mask, chunks=chunks)
    expected = compute_reference(model, ids, mask)[mask.bool()]
    assert expected.abs().max() > 1
    assert (logits - expected).abs().max() < ATOL[runner.precision]


def test_the_last_logits_alone_are_the_same(exported):
    model, folder = exported
    runner = load_ort_runner(folder)
    ids, mask = make_batch([9, 4, 11], vocab_size=model.config.vocab_size)
    every = runner.forward(ids, attention_mask=mask).logits
    last = runner.forward(ids, attention_mask=mask, last_only=True).logits
    assert last.shape == (3, 1, model.config.vocab_size)
    assert (last[:, 0] - every[:, -1]).abs().max() < ATOL[runner.precision]


def test_the_graph_is_of_the_runtimes_operators(exported):
    model, folder = exported
    layers = model.config.num_hidden_layers
    found = count_operators(folder)
    assert found["GroupQueryAttention"] == layers
    assert found["SkipSimplifiedLayerNormalization"] == 2 * layers
    assert found["QuickGelu"] == layers
    # Nothing that would copy the cache or repeat its heads.
    assert not {"Attention", "Concat", "Expand", "Tile", "Softmax", "RotaryEmbedding"} & set(found)


def test_the_contract_names_what_the_graph_has(exported):
    _, folder = exported
    contract = json.loads((folder / "io.json").read_text())
    graph = load_graph(folder)
    assert graph.opset_import[0].version == contract["opset"] == OPSET
    for key, values in (("inputs", graph.graph.input), ("outputs", graph.graph.output)):
        listed = [(item["name"], item["shape"]) for item in contract[key]]
        assert listed == [
            (v.name, [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim])
            for v in values
        ]
    config = load_config(folder)
    assert contract["num_key_value_heads"] == [w.kv_heads for w in list_widths(config)]
    assert contract["eos_token_ids"] == [2]


def test_a_tied_table_is_stored_once(tmp_path):
    model = make_model(tmp_path / "model", vocab_size=2000, tie_word_embeddings=True)
    export_ort(model, tmp_path / "ort")
    stored = (model / "model.safetensors").stat().st_size
    assert (tmp_path / "ort" / "model.onnx.data").stat().st_size < 1.1 * stored


@pytest.mark.parametrize(("precision", "bits"), [("int8", 8), ("int4", 4)])
def test_a_tied_table_is_packed_once(tmp_path, precision, bits):
    """The packed table, a scale for each block, and little else: no copy in full precision."""
    model = make_model(tmp_path / "model", vocab_size=2000, tie_word_embeddings=True)
    export_ort(model, tmp_path / "ort", precision=precision, block_size=16)
    numbers = (model / "model.safetensors").stat().st_size / 4
    packed = numbers * (bits / 8 + 4 / 16)
    assert (tmp_path / "ort" / "model.onnx.data").stat().st_size < 1.2 * packed
    assert count_operators(tmp_path / "ort")["GatherBlockQuantized"] == 1


def read_quantized(folder, module):
    """Packed weights and scales as numbers, unpacked by hand: (out, in) and (out, in / block)."""
    graph = load_graph(folder).graph
    tensors = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    node = next(n for n in graph.node if n.op_type == "MatMulNBits" and n.name == module)
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    packed, scales = tensors[node.input[1]], tensors[node.input[2]]
    if values["bits"] == 4:  # two a byte, the lower half first
        packed = np.stack([packed & 15, packed >> 4], axis=-1)
    middle = 2 ** (values["bits"] - 1)
    integers = packed.reshape(values["N"], -1, values["block_size"]).astype(np.float32) - middle
    return integers, scales.reshape(values["N"], -1, 1)


@pytest.mark.parametrize(
    ("precision", "kv_heads", "packed"),
    [
        ("int4", 2, {"qk_proj": 4, "v_proj": 8, "o_proj": 4, "down_proj": 4}),
        ("int4", 4, {"qkv_proj": 4, "o_proj": 4, "down_proj": 4}),
        ("int8", 2, {"qkv_proj": 8, "o_proj": 8, "down_proj": 8}),
    ],
)
def test_values_that_several_heads_read_have_more_bits(tmp_path, precision, kv_heads, packed):
    model = make_model(tmp_path / "model", kv_heads=kv_heads)
    export_ort(model, tmp_path / "ort", precision=precision, block_size=16)
    bits = {
        node.name.rpartition(".")[2]: attribute.i
        for node in load_graph(tmp_path / "ort").graph.node
        for attribute in node.attribute
        if attribute.name == "bits" and node.name.startswith("model.layers.0.")
    }
    others = dict.fromkeys(("gate_proj", "up_proj"), packed["o_proj"])
    assert bits == packed | others


def compute_in_float32(folder):
    """Let the products keep activations as they are, which the fast kernels round to int8."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                assert attribute.i == 4
                attribute.i = 1
    onnx.save(model, folder / "model.onnx")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("precision", "block_size"), [("int8", 16), ("int4", 32)])
def test_packed_weights_are_the_nearest_and_compute_what_they_say(
    tmp_path, precision, block_size, tied
):
    sizes = {"hidden_size": 64, "intermediate_size": 96}
    model_folder = make_model(tmp_path / "model", **sizes, tie_word_embeddings=tied)
    export_ort(model_folder, tmp_path / "ort", precision=precision, block_size=block_size)
    model = load_model(model_folder)
    stored = load_file(model_folder / "model.safetensors")
    products = {n: [n] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    for layer in range(2):  # one product for queries, keys and values
        own = f"model.layers.{layer}.self_attn"
        parts = [products.pop(f"{own}.{part}_proj")[0] for part in ("q", "k", "v")]
        products[f"{own}.qkv_proj"] = parts
    assert len(products) == 11
    if tied:
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"]
    for product, modules in products.items():
        integers, scales = read_quantized(tmp_path / "ort", product)
        weight = np.concatenate([stored[f"{module}.weight"].numpy() for module in modules])
        unpacked = (integers * scales).reshape(weight.shape)
        # Symmetric with one more level below zero than above: at the far end a whole step.
        error = np.abs(unpacked - weight).reshape(integers.shape)
        assert (error <= np.abs(scales) * 1.001).all()
        assert np.median(error / np.abs(scales)) < 0.3  # uniform over half a step: 0.25
        start = 0
        for module in modules:
            linear = model.get_submodule(module)
            stop = start + linear.out_features
            # Of a tied model, the embedding is the same parameter: tokens are looked up in it.
            linear.weight.data = torch.from_numpy(unpacked[start:stop])
            start = stop
    compute_in_float32(tmp_path / "ort")
    ids, mask = make_batch([9, 4, 11], vocab_size=model.config.vocab_size)
    logits = run_with_cache(load_ort_runner(tmp_path / "ort"), ids, mask, chunks=[9, 1, 1])
    expected = compute_reference(model, ids, mask)[mask.bool()]
    assert (logits - expected).abs().max() < ATOL["fp32"]


def test_genai_opens_the_folder_and_writes_the_same_tokens(tmp_path):
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    model_folder = make_model(tmp_path / "model", heads=3, model_type="mistral")
    contract = export_ort(model_folder, tmp_path / "ort", max_seq_len=64)
    assert contract.packing.genai is True
    prompt = [5, 17, 40, 9, 33]
    model = load_model(model_folder)
    model.generation_config.eos_token_id = None
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0]
    opened = genai.Model(str(tmp_path / "ort"))
    settings = genai.GeneratorParams(opened)
    settings.set_search_options(max_length=25, min_length=25)
    generator = genai.Generator(opened, settings)
    generator.append_tokens(np.array([prompt], dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    written = generator.get_sequence(0).tolist()
    stop = next((i for i, token in enumerate(expected.tolist()) if i >= 5 and token == 2), 25)
    assert written[:stop] == expected.tolist()[:stop]
    assert stop > 8


def test_heads_that_differ_between_layers_are_not_for_genai(exported):
    _, folder = exported
    heads = json.loads((folder / "io.json").read_text())["num_key_value_heads"]
    for name in ("genai.onnx", "genai_config.json"):
        assert (folder / name).is_file() == (len(set(heads)) == 1)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"precision": "fp8"}, "`precision` fp8 is not supported by engine ort. Use fp32, "),
        ({"precision": "int4", "block_size": 24}, "`block_size` 24 is not a block .* Use 16, 32"),
        (
            {"precision": "int4", "block_size": 64},
            "`block_size` 64 does not divide the 32 inputs of .*q_proj.weight. Use `block_size=32`",
        ),
        (
            {"activations": "fp16"},
            "`activations` fp16 goes with int8 or int4 .* Leave `activations` out",
        ),
        ({"max_seq_len": 4000}, "`max_seq_len` 4000 does not fit a model of 128 positions"),
    ],
)
def test_bad_options_leave_nothing_behind(tmp_path, options, sentence):
    model = make_model(tmp_path / "model")
    with pytest.raises(LpdeployError, match=sentence):
        export_ort(model, tmp_path / "ort", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_width_of_no_block_names_the_rounding_that_has_one(tmp_path):
    model = make_model(tmp_path / "model", intermediate_size=43)
    with pytest.raises(LpdeployError, match="the 43 inputs of .* Prune with `round_to=32`, or"):
        export_ort(model, tmp_path / "ort", precision="int8")


def test_heads_that_the_operator_does_not_take(tmp_path):
    model = make_tiny_model(tmp_path / "model")
    with pytest.raises(LpdeployError, match="heads of a multiple of 16.* have 8. Use `engine=.on"):
        export_ort(model, tmp_path / "ort")


def test_positions_that_depend_on_the_length(tmp_path):
    model = make_model(
        tmp_path / "model",
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "factor": 2.0,
            "original_max_position_embeddings": 64,
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
        },
    )
    with pytest.raises(LpdeployError, match="rotary positions of type 'longrope'.* `engine=.onnx"):
        export_ort(model, tmp_path / "ort")


@pytest.mark.parametrize("engine", ["ort", "onnx"])
def test_positions_that_change_while_a_text_grows(engine, tmp_path):
    model = make_model(
        tmp_path / "model",
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    )
    with pytest.raises(LpdeployError, match="No export takes rotary positions of type 'dynamic'"):
        export(str(model), engine=engine, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_with_a_hole(tmp_path):
    model = make_model(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    from safetensors.torch import save_file

    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="has no model.layers.1.mlp.up_proj.weight. Give a com"):
        export_ort(model, tmp_path / "ort")
    assert not (tmp_path / "ort").exists()


def test_a_damaged_checkpoint(tmp_path):
    model = make_model(tmp_path / "model")
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ArtifactError, match="cannot be read: .* Copy the checkpoint anew"):
        export_ort(model, tmp_path / "ort")


@pytest.mark.parametrize("activations", ["fp32", "fp16"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_weights_with_scales_in_half_precision_are_the_checkpoints(
    tmp_path, precision, activations
):
    """A scale that is rounded moves the largest numbers of its block by a part of a step."""
    model = make_model(tmp_path / "model", hidden_size=64, intermediate_size=96)
    options = {"precision": precision, "activations": activations, "block_size": 16}
    export_ort(model, tmp_path / "ort", **options)
    names = {"a": "torch", "b": "ort"}
    found = check_weights(tmp_path / "ort", model, adapter=None, precision=precision, **names)
    assert found.ok, found.wrong
