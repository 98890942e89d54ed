"""`lpdeploy check` as users and scripts meet it."""

import json

import pytest
from click.testing import CliRunner
from transformers import LlamaConfig

from lpdeploy.cli.main import main


@pytest.fixture
def model(tmp_path):
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=2, num_attention_heads=16,
        vocab_size=1000, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def invoke(*words):
    return CliRunner().invoke(main, ["check", *(str(word) for word in words)])


def test_what_scripts_read(model):
    result = invoke(model, "--ratio", "0.2", "--tensor-parallel", "4", "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout.splitlines()[-1])
    assert {key: data["shape"][key] for key in ("heads", "kv_heads", "channels")} == {
        "heads": 13, "kv_heads": 13, "channels": 2240,
    }  # fmt: skip
    servers = {row["name"]: row for row in data["servers"]}
    assert {"transformers", "vllm", "sglang", "tensorrt", "tensorrt-llm", "triton",
            "onnxruntime-genai", "llama.cpp"} == servers.keys()  # fmt: skip
    assert servers["vllm"]["loads"] == "no"
    assert servers["vllm"]["tested"] == "0.32.0"


def test_query_heads_leave_the_cache_as_it_is(tmp_path):
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=1000,
    )  # fmt: skip
    config.save_pretrained(tmp_path / "model")
    shapes = {}
    for heads in ("kv-groups", "query-heads"):
        result = invoke(tmp_path / "model", "--ratio", "0.33", "--heads", heads, "--json")
        shape = json.loads(result.stdout.splitlines()[-1])["shape"]
        shapes[heads] = (shape["heads"], shape["kv_heads"])
    assert shapes == {"kv-groups": (6, 2), "query-heads": (6, 3)}
    refused = invoke(tmp_path / "model", "--heads", "auto")
    assert refused.exit_code == 2
    assert "check shows one shape. Give --heads kv-groups or --heads" in refused.stderr


def test_what_people_read(model):
    result = invoke(model, "--ratio", "0.2", "--tensor-parallel", "4")
    lines = result.output.splitlines()
    assert lines[0] == "MistralForCausalLM: 2 layers, 13 heads (13 KV) of 64, 2240 channels"
    assert any(
        line.startswith("vllm               no         13 attention heads") for line in lines
    )
    # 12 is the multiple of 4 next to 13, 2304 the multiple of 256 next to 2240.
    assert lines[-1].startswith("Nearest shape that loads")
    assert ": --ratio 0.2 --round-heads-to " in lines[-1]
    assert lines[-1].endswith("(12 heads, 2304 channels)")


def test_bad_input_is_one_sentence(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "gpt2"}')
    result = invoke(tmp_path / "model")
    assert result.exit_code == 1
    assert "is a gpt2, which lpdeploy does not know" in result.output
    assert invoke(tmp_path / "model", "--ratio", "1").exit_code == 2
