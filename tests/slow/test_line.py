"""The line on real pretrained models: what is pruned loads in plain transformers and still writes.

Few steps only; docs/measurements/ holds the figures of whole runs.
"""

import json

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from lpdeploy.cli.main import main
from tests.helpers import need_shared

pytestmark = pytest.mark.real
TRAINING = [
    "--steps", "3", "--batch-size", "4", "--micro-batch-size", "4", "--seq-len", "64",
    "--prune-every", "1", "--lr", "1e-3", "--device", "cpu",
]  # fmt: skip


def call(*words):
    result = CliRunner().invoke(main, [*map(str, words), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def take_through(model, output, *words):
    shared = need_shared()
    data = shared / "data" / "tinystories"
    call("prune", shared / "models" / model, "--data", data / "valid.txt", "--output", output,
         *TRAINING, *words)  # fmt: skip
    compacted = call("compact", output)
    assert call("verify", output, "--engine", "torch")["ok"]
    return compacted


def generate(folder, prompt, tokens):
    model = AutoModelForCausalLM.from_pretrained(folder)  # no trust_remote_code
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    written = model.generate(ids, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(written[0], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("ratio", "heads", "channels", "architecture"),
    [
        (0.5, 4, 352, "LlamaForCausalLM"),
        # Six heads do not divide the hidden size of 256, which LlamaConfig refuses.
        (0.2, 6, 576, "MistralForCausalLM"),
    ],
)
def test_a_model_of_six_million_parameters(tmp_path, ratio, heads, channels, architecture):
    result = take_through("tinystories-llama-6M", tmp_path / "run", "--ratio", ratio)
    assert result["heads"] == result["kv_heads"] == [heads] * 6
    assert result["channels"] == [channels] * 6
    assert result["architecture"] == architecture
    text = generate(tmp_path / "run" / "model", "once upon a time", 10)
    assert text.startswith("once upon a time")
    assert len(text.split()) > 6


@pytest.mark.parametrize(("round_to", "channels"), [(2, 86), (32, 96)])
def test_grouped_heads_are_halved(tmp_path, round_to, channels):
    words = ("--ratio", "0.5", "--round-to", round_to)
    result = take_through("stories260K", tmp_path / "run", *words)
    assert result["heads"] == [4] * 5
    assert result["kv_heads"] == [2] * 5
    assert result["channels"] == [channels] * 5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert model.model.layers[0].self_attn.k_proj.weight.shape == torch.Size([16, 64])


def test_the_published_output_of_the_unpruned_model():
    text = generate(need_shared() / "models" / "stories260K", "Once upon a time", 30)
    assert text.startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play"
    )


@pytest.mark.parametrize("source", ["c4/c4_sample_a.jsonl", "instruct/alpaca_en_demo.json"])
def test_other_kinds_of_data(tmp_path, source):
    shared = need_shared()
    model = shared / "models" / "tinystories-llama-6M"
    words = ("--data", shared / "data" / source, "--output", tmp_path / "run")
    result = call("prune", model, *words, *TRAINING, "--scope", "global", "--protect-first", "1")
    assert 0 < result["achieved"]["groups"] < 0.5
