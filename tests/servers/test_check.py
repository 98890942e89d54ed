"""Which server loads which shape, against the servers that run here; costs, tiles, suggestions."""

import dataclasses
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from lpdeploy.config import PruneConfig
from lpdeploy.engines.ort.exporter import export_ort
from lpdeploy.errors import ArtifactError, LpdeployError
from lpdeploy.models.loading import get_model_classes
from lpdeploy.models.shapes import LayerWidths, build_pruned_config, forecast_config
from lpdeploy.pruning.run import prune
from lpdeploy.servers.check import (
    check,
    describe_request,
    describe_servers,
    list_alignment,
    suggest,
)
from lpdeploy.servers.verdicts import list_verdicts
from tests.helpers import make_tiny_model, make_tokenizer

BASE = {"vocab_size": 72, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64}  # fmt: skip


def build_config(widths, *, head_dim=16, **values):
    config = LlamaConfig(**{**BASE, "num_key_value_heads": 4, "head_dim": head_dim, **values})
    return build_pruned_config(config, [LayerWidths(*layer) for layer in widths])


SHAPES = {
    "dividing": build_config([(2, 2, 32)] * 2),
    "odd-heads": build_config([(3, 3, 40)] * 2),
    "grouped": build_config([(2, 1, 32)] * 2, num_key_value_heads=2),
    "short-heads": build_config([(3, 3, 32)] * 2, head_dim=8),
    "per-layer-channels": build_config([(2, 2, 32), (2, 2, 16)]),
    "per-layer-heads": build_config([(2, 2, 32), (3, 3, 32)]),
}


def get_verdict(config, name, *, ranks=1):
    verdicts = list_verdicts(config, tensor_parallel=ranks)
    return next(verdict for verdict in verdicts if verdict.name == name)


@pytest.fixture(scope="module", params=SHAPES)
def saved(request, tmp_path_factory):
    """A checkpoint of each shape, with what compact puts beside one of per-layer widths."""
    from lpdeploy.families import modeling_per_layer

    config = SHAPES[request.param]
    folder = tmp_path_factory.mktemp("shapes") / request.param
    _, model_class = get_model_classes(config.model_type)
    torch.manual_seed(0)
    model_class(config).save_pretrained(folder)
    config.save_pretrained(folder)
    make_tokenizer(folder)
    if config.model_type.startswith("lpdeploy_"):
        shutil.copy(modeling_per_layer.__file__, folder)
    return config, folder


def test_transformers_loads_what_the_table_says(saved):
    config, folder = saved
    verdict = get_verdict(config, "transformers")
    if verdict.loads == "yes":
        model = AutoModelForCausalLM.from_pretrained(folder)
    else:
        assert "trust_remote_code=True" in verdict.why
        with pytest.raises(ValueError, match="lpdeploy_llama|trust_remote_code"):
            AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert model(torch.tensor([[5, 17]])).logits.isfinite().all()


def test_genai_loads_what_the_table_says(saved, tmp_path):
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    config, folder = saved
    try:
        contract = export_ort(folder, tmp_path / "ort", max_seq_len=32)
        loads = contract.packing.genai and bool(genai.Model(str(tmp_path / "ort")))
    except LpdeployError:
        loads = False
    assert get_verdict(config, "onnxruntime-genai").loads == ("yes" if loads else "no")


def test_the_table_has_all_answers_for_these_shapes():
    answers = {(name, get_verdict(config, server).loads) for name, config in SHAPES.items()
               for server in ("transformers", "onnxruntime-genai")}  # fmt: skip
    assert {loads for _, loads in answers} == {"yes", "condition", "no"}


def test_per_layer_widths_load_in_few_servers():
    for name in ("vllm", "sglang", "tensorrt-llm", "llama.cpp"):
        verdict = get_verdict(SHAPES["per-layer-channels"], name)
        assert (verdict.loads, "`scope=layer`" in verdict.why) == ("no", True)
    assert get_verdict(SHAPES["per-layer-channels"], "tensorrt").loads == "yes"


LLAMA_7B = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
            "dtype": "float16"}  # fmt: skip


def build_7b(heads, channels, **values):
    config = LlamaConfig(**{**LLAMA_7B, **values})
    per_group = config.num_attention_heads // config.num_key_value_heads
    widths = [LayerWidths(heads, heads // per_group, channels)] * 32
    return build_pruned_config(config, widths)


DIVISIONS = {
    (26, 32, 8832, 4): "26 attention heads do not divide over `tensor_parallel=4`. Use "
    "`round_heads_to=4` (24 or 28 heads), or `tensor_parallel=2`.",
    (20, 8, 8832, 8): "20 attention heads do not divide over `tensor_parallel=8`. Use "
    "`round_heads_to=2` (16 or 24 heads), or `tensor_parallel=5`.",
    (12, 8, 8832, 2): "3 KV heads neither divide over `tensor_parallel=2` nor the reverse. Use "
    "`round_heads_to=2`.",
    (24, 32, 8830, 4): "8830 channels do not divide over `tensor_parallel=4`. Use `round_to` with "
    "a multiple of it.",
}


@pytest.mark.parametrize(("shape", "sentence"), DIVISIONS.items())
def test_what_does_not_divide_over_ranks(shape, sentence):
    heads, kv_heads, channels, ranks = shape
    config = build_7b(heads, channels, num_key_value_heads=kv_heads)
    for name in ("vllm", "sglang", "tensorrt-llm"):
        verdict = get_verdict(config, name, ranks=ranks)
        assert (verdict.loads, verdict.why) == ("no", sentence)
        assert get_verdict(config, name).loads == "yes"


def test_any_number_of_ranks_is_judged_at_once():
    why = get_verdict(build_7b(26, 8832), "vllm", ranks=10**12).why
    assert "or `tensor_parallel=26`" in why


def test_graphs_run_on_one_gpu():
    for name in ("tensorrt", "triton", "onnxruntime-genai"):
        assert "one GPU" in get_verdict(build_7b(24, 8832), name, ranks=2).why


@pytest.mark.parametrize(
    ("channels", "words"),
    [(8704, None), (8832, "8832 is none: such tensors take a type of more bits. Use `round_to"),
     (8808, "multiple of 32, and 8808 is none: such tensors stay in f16")],
)  # fmt: skip
def test_blocks_of_gguf(channels, words):
    verdict = get_verdict(build_7b(26, channels), "llama.cpp")
    assert verdict.loads == ("yes" if words is None else "condition")
    assert words is None or words in verdict.why


def test_rounding_channels_is_no_advice_where_heads_are_the_cause():
    why = get_verdict(build_7b(27, 8704), "llama.cpp").why  # 27 heads of 128 are 3456 columns
    assert "and 3456 is none" in why
    assert "round_to" not in why


def test_tiles():
    rows = {row.width: row for row in list_alignment(build_7b(26, 8810), ranks=2)}
    # 13 heads of 128 fill 13 tiles; 4,405 channels need 35 tiles of 128, which hold 4,480.
    assert dataclasses.asdict(rows["query rows"]) == {
        "width": "query rows", "size": 1664, "multiple": 128, "aligned": True, "waste": 0.0,
    }  # fmt: skip
    assert (rows["channels"].size, rows["channels"].multiple) == (4405, 1)
    assert rows["channels"].aligned is False
    assert rows["channels"].waste == pytest.approx(75 / 4480)


def test_costs_of_a_7b(tmp_path):
    LlamaConfig(**LLAMA_7B, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    result = check(str(tmp_path), PruneConfig(), tokens=2048).to_json()
    assert result["shape"] == {
        "architecture": "LlamaForCausalLM", "hidden_size": 4096, "layers": 32, "head_dim": 128,
        "heads": 16, "kv_heads": 16, "channels": 5504,
    }  # fmt: skip
    assert result["before"]["parameters"] == 6_738_415_616  # LLaMA-7B's own number
    assert result["before"]["bytes"] == 2 * 6_738_415_616
    # By hand: half of the layers' projections go; embeddings, head and norms stay.
    layer = 4 * 4096 * 2048 + 3 * 4096 * 5504
    after = 32 * (layer + 2 * 4096) + 4096 + 2 * 32000 * 4096
    assert result["after"]["parameters"] == after
    cache = 2 * 32 * 16 * 128 * 2048 * 2
    assert result["after"]["decode_bytes"] == 2 * (after - 32000 * 4096) + cache
    assert result["suggestion"]["options"] == "`ratio=0.5` `round_heads_to=1` `round_to=256`"


def test_a_suggestion_costs_no_server():
    config = LlamaConfig(**LLAMA_7B)
    found = suggest(config, PruneConfig(ratio=0.2).widths, ranks=4)
    shape = forecast_config(config, found)
    assert shape.num_attention_heads % 4 == 0
    assert shape.intermediate_size % 256 == 0
    assert {v.loads for v in list_verdicts(shape, tensor_parallel=4) if v.name in
            ("vllm", "sglang", "llama.cpp", "transformers")} == {"yes"}  # fmt: skip
    assert suggest(config, found, ranks=4) is None


def test_a_model_that_a_server_does_not_take_anyway():
    # Hidden 64 is no multiple of 256, pruned or not: nothing can be suggested for llama.cpp.
    config = LlamaConfig(**{**BASE, "num_key_value_heads": 4, "head_dim": 16})
    assert suggest(config, PruneConfig(round_to=8).widths, ranks=1) is None


@pytest.mark.slow
def test_a_run_has_its_own_shape(tmp_path, base, data):
    options = PruneConfig(
        ratio=0.5, steps=2, batch_size=2, micro_batch_size=2, seq_len=16, prune_every=1,
        round_to=4, calibration_samples=2, scope="global", criterion="random",
    )  # fmt: skip
    prune(str(base), tmp_path / "run", data=str(data), options=options)
    result = check(str(tmp_path / "run"), PruneConfig(ratio=0.9))
    assert result.ratio == 0.5
    assert result.suggestion is None
    channels = result.shape.channels
    assert sum(channels if isinstance(channels, list) else [channels] * 2) == 48


def test_no_model(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="empty' is no Hugging Face model: .* Give a folder"):
        check(str(tmp_path / "empty"), PruneConfig())


def test_the_short_form():
    text = describe_servers(list_verdicts(build_7b(26, 8832), tensor_parallel=4))
    assert text == (
        "The pruned model loads in transformers; loads on a condition in llama.cpp; does not load "
        "in vllm, sglang, tensorrt, tensorrt-llm, triton, onnxruntime-genai."
    )


def test_a_server_that_nobody_tried_is_not_said_to_load_the_model():
    verdicts = list_verdicts(build_7b(16, 8192))
    untried = [verdict.name for verdict in verdicts if not verdict.tried]
    assert untried == ["tensorrt-llm"]
    loads = describe_servers(verdicts).split(";")[0]
    assert "vllm" in loads
    assert not any(name in loads for name in untried)
    assert "should load in tensorrt-llm (not tried)" in describe_servers(verdicts)


def test_weights_are_not_read(tmp_path):
    folder = make_tiny_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    assert check(str(folder), PruneConfig(round_to=8)).shape.channels == 24


def test_heads_and_channels_have_ratios_of_their_own():
    config = LlamaConfig(**{**BASE, "num_attention_heads": 8, "num_key_value_heads": 4})
    request = PruneConfig(head_ratio=0.25, channel_ratio=0.75, round_to=4).widths
    shape = forecast_config(config, request)
    assert (shape.num_key_value_heads, shape.intermediate_size) == (3, 12)
    assert describe_request(request) == (
        "`head_ratio=0.25` `channel_ratio=0.75` `round_heads_to=1` `round_to=4`"
    )
    found = suggest(config, PruneConfig(head_ratio=0.25, round_to=4).widths, ranks=2)
    assert found is not None
    assert forecast_config(config, found).num_key_value_heads % 2 == 0
    assert found.ratios["channels"] - found.ratios["heads"] == pytest.approx(0.25)


def test_protected_layers_stay_whole_in_the_check(tmp_path):
    folder = make_tiny_model(tmp_path / "model")
    shape = check(str(folder), PruneConfig(round_to=8, protect_first=1)).shape
    assert shape.channels == [48, 24]


def test_a_tokenizer_that_llama_cpp_does_not_know_is_told_before_training(tmp_path):
    folder = make_tiny_model(tmp_path / "model")  # its tokenizer knows whole words only
    (verdict,) = (v for v in check(str(folder), PruneConfig()).servers if v.name == "llama.cpp")
    assert verdict.loads == "no"
    assert "its kind is WordLevel" in verdict.why
    for file in folder.glob("tokenizer*"):
        file.unlink()
    (verdict,) = (v for v in check(str(folder), PruneConfig()).servers if v.name == "llama.cpp")
    assert "WordLevel" not in verdict.why
