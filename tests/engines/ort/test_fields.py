"""Each field of a config that changes the computation is honored by the graph, or refused."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lpdeploy.engines.export import export_folder
from lpdeploy.engines.ort.runner import load_ort_runner
from lpdeploy.engines.verify import build_inputs, collect_logits
from lpdeploy.errors import LpdeployError
from lpdeploy.families import FAMILIES
from lpdeploy.servers.package import package

SHAPE = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 64, "hidden_act": "silu",
}  # fmt: skip
# Each with a value that changes the logits; not every family has all of them.
COMPUTED = {
    "rms_norm_eps": 0.1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": True,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"],
    "use_sliding_window": True,
    "max_window_layers": 1,
}
# What is read by others (tokens, training, how a forward pass returns), or describes the file.
ELSEWHERE = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "initializer_range"),
    *("attention_dropout", "pretraining_tp", "architectures", "dtype", "model_type"),
    *("_name_or_path", "transformers_version", "chunk_size_feed_forward", "id2label", "label2id"),
    *("is_encoder_decoder", "output_attentions", "output_hidden_states", "problem_type"),
    "return_dict",
}


def list_cases():
    for family, record in FAMILIES.items():
        fields = record.load_classes()[0]().to_dict()
        yield from ((family, field) for field in COMPUTED if field in fields)


def build(family, folder, **changes):
    config_class, model_class = FAMILIES[family].load_classes()
    torch.manual_seed(0)
    config = config_class(**{**SHAPE, **changes})
    model = model_class(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zeros would hide it
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return config


def compute(folder):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    rows = build_inputs(SHAPE["vocab_size"], limit=64)
    return [model(torch.tensor([row])).logits[0].detach() for row in rows]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_has_been_looked_at(family):
    config_class, _ = FAMILIES[family].load_classes()
    fields = set(config_class().to_dict())
    assert fields <= SHAPE.keys() | COMPUTED.keys() | ELSEWHERE


@pytest.mark.parametrize(("family", "field"), list_cases())
def test_a_field_that_changes_the_logits_changes_those_of_the_graph(family, field, tmp_path):
    config_class, _ = FAMILIES[family].load_classes()
    windowed = {"sliding_window": 5, "use_sliding_window": True}
    own = "use_sliding_window" in config_class().to_dict()
    extra = windowed if own and field in ("layer_types", "max_window_layers", *windowed) else {}
    build(family, tmp_path / "model", **{**extra, field: COMPUTED[field]})
    expected = compute(tmp_path / "model")
    export_folder("ort", tmp_path / "model", tmp_path / "ort")
    runner = load_ort_runner(tmp_path / "ort")
    for row, logits in zip(build_inputs(SHAPE["vocab_size"], limit=64), expected, strict=True):
        # float32 sums of two small layers in another order.
        torch.testing.assert_close(collect_logits(runner, [row]), logits, atol=2e-5, rtol=1e-5)


@pytest.mark.slow
def test_another_activation_is_refused(tmp_path):
    for family in FAMILIES:
        folder = tmp_path / family
        build(family, folder, hidden_act="gelu")
        with pytest.raises(LpdeployError, match="uses 'gelu'. Use `engine='onnx'`"):
            export_folder("ort", folder, tmp_path / f"{family}-ort")
        for target in ("genai", "llamacpp", "vllm"):
            with pytest.raises(LpdeployError, match="SiLU only, and not with 'gelu'"):
                package(str(folder), kind=target, output=tmp_path / "out")
    export_folder("onnx", folder, tmp_path / "onnx")  # what the sentence offers
