"""Loading a checkpoint: from a folder or the hub, and what is said where it cannot be."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lpdeploy.errors import ArtifactError
from lpdeploy.models.loading import (
    compute_model_sha256,
    get_model_classes,
    load_config,
    load_model,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
)
from tests.models.families import FAMILIES, compute_logits, edit_json, make_base

WEIGHTS = "model.safetensors"


@pytest.fixture
def base(bases, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(bases("llama-gqa"), tmp_path / "base")


def test_another_architecture_is_named_with_those_supported(base):
    edit_json(base / "config.json", model_type="gpt2", architectures=["GPT2LMHeadModel"])
    with pytest.raises(
        ArtifactError, match=r"is a GPT2LMHeadModel, .* Use LlamaForCausalLM, Mistral.*Qwen3"
    ):
        load_config(base)
    edit_json(base / "config.json", drop=["architectures"])
    with pytest.raises(ArtifactError, match="is a gpt2, which lpdeploy does not know"):
        load_config(base)
    edit_json(base / "config.json", drop=["model_type"])
    with pytest.raises(ArtifactError, match="is a None, which lpdeploy does not know"):
        load_config(base)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe{}", b"[]"])
def test_a_config_that_is_no_json_object_is_refused(base, content):
    (base / "config.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"config.json' .*Copy the checkpoint anew"):
        load_config(base)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"num_attention_heads": 3, "num_key_value_heads": 3}, "not a multiple of the number of"),
        ({"hidden_size": "many"}, "'hidden_size' expected int"),
        ({"num_key_value_heads": 3}, "8 query heads do not divide over 3 KV heads"),
    ],
)
def test_a_config_that_cannot_be_is_refused_with_the_reason(base, values, reason):
    edit_json(base / "config.json", **values)
    with pytest.raises(ArtifactError, match=rf"is not valid: .*{reason}.*Correct its config.json"):
        load_config(base)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_whole(bases, family):
    model = load_model(bases(family))
    _, model_class = get_model_classes(load_config(bases(family)).model_type)
    assert type(model) is model_class
    assert not model.training
    state = model.state_dict()
    for name, tensor in load_file(bases(family) / WEIGHTS).items():
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize(
    ("asked", "stored", "expected"),
    [
        ("auto", torch.bfloat16, torch.bfloat16),
        ("auto", torch.float32, torch.float32),
        ("fp32", torch.bfloat16, torch.float32),
        ("bf16", torch.float32, torch.bfloat16),
        ("fp16", torch.float32, torch.float16),
    ],
)
def test_a_model_loads_in_the_asked_precision(bases, asked, stored, expected):
    model = load_model(bases("llama-bias", stored), dtype=asked)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


def test_an_unknown_precision_is_a_value_error(base):
    with pytest.raises(ValueError, match="dtype is 'float32'; it must be auto, fp32, fp16, bf16"):
        load_model(base, dtype="float32")


def test_a_missing_weight_is_refused_and_not_made_up(base):
    tensors = load_file(base / WEIGHTS)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, base / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(
        ArtifactError, match=r"lacks 1 weights .* first .*1.mlp.up_proj.weight. Give a complete"
    ):
        load_model(base)


def test_weights_of_another_shape_are_refused(base):
    edit_json(base / "config.json", intermediate_size=64)
    with pytest.raises(
        ArtifactError,
        match=r"lacks 6 weights .* or has them in another shape, first .*0.mlp.down_proj.weight",
    ):
        load_model(base)


def test_a_tied_head_is_not_missing(bases):
    assert "lm_head.weight" not in load_file(bases("llama-tied") / WEIGHTS)
    model = load_model(bases("llama-tied"))
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("size", [4, -100])  # within the header, within the last tensor
def test_a_truncated_file_is_refused(base, size):
    (base / WEIGHTS).write_bytes((base / WEIGHTS).read_bytes()[:size])
    with pytest.raises(ArtifactError, match=r"cannot be loaded: .* Copy the checkpoint anew"):
        load_model(base)


def test_a_shard_that_is_not_there_is_refused(bases, tmp_path):
    load_model(bases("llama-gqa")).save_pretrained(tmp_path, max_shard_size="20KB")
    min(tmp_path.glob("model-*.safetensors")).unlink()
    with pytest.raises(ArtifactError, match=r"cannot be loaded: .* Copy the checkpoint anew"):
        load_model(tmp_path)


def test_a_tokenizer_comes_with_its_model(base):
    tokenizer = load_tokenizer(base, load_config(base))
    assert tokenizer("w0 w1")["input_ids"] == [3, 4]


def test_a_missing_tokenizer_is_refused(base):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    with pytest.raises(ArtifactError, match=r"has no tokenizer. Copy its tokenizer files"):
        load_tokenizer(base, load_config(base))


@pytest.mark.parametrize("content", ["{", "{}"])
def test_a_broken_tokenizer_is_refused(base, content):
    (base / "tokenizer.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"The tokenizer of .* cannot be loaded: .*Copy"):
        load_tokenizer(base, load_config(base))


def test_a_tokenizer_larger_than_the_embedding_is_refused(base):
    edit_json(base / "config.json", vocab_size=63)
    with pytest.raises(ArtifactError, match=r"the token 63, and its model embeds only 63 tokens"):
        load_tokenizer(base, load_config(base))
    edit_json(base / "config.json", vocab_size=64)
    assert len(load_tokenizer(base, load_config(base))) == 64


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, None])
def test_auto_computes_in_fp32_on_a_cpu(base, stored):
    config = load_config(base)
    config.dtype = stored
    assert resolve_dtype("auto", config, device="cpu") == "fp32"
    assert resolve_dtype("bf16", config, device="cpu") == "bf16"
    assert resolve_dtype("fp16", config, device="cuda") == "fp16"


@pytest.mark.parametrize(
    ("stored", "supported", "expected"),
    [
        (torch.float16, True, "bf16"),
        (torch.bfloat16, True, "bf16"),
        (torch.bfloat16, False, "fp32"),
        (torch.float32, True, "fp32"),
    ],
)
def test_auto_computes_in_bf16_on_a_gpu_that_has_it(base, monkeypatch, stored, supported, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: supported)
    config = load_config(base)
    config.dtype = stored
    assert resolve_dtype("auto", config, device="cuda:1") == expected


@pytest.mark.parametrize("available", [True, False])
def test_the_device_is_what_is_there(monkeypatch, available):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert resolve_device("auto") == ("cuda" if available else "cpu")
    assert resolve_device("cpu") == "cpu"
    if available:
        assert resolve_device("cuda:1") == "cuda:1"
    else:
        with pytest.raises(ArtifactError, match="finds no CUDA device. .*cpu.*, or"):
            resolve_device("cuda:1")


def test_the_hash_is_of_what_computes(base, tmp_path):
    before = compute_model_sha256(base)
    (base / "README.md").write_text("changed")
    edit_json(base / "tokenizer_config.json", model_max_length=7)
    assert compute_model_sha256(base) == before
    moved = shutil.copytree(base, tmp_path / "moved")
    assert compute_model_sha256(moved) == before
    edit_json(base / "config.json", rms_norm_eps=1e-3)
    changed = compute_model_sha256(base)
    assert changed != before
    tensors = load_file(base / WEIGHTS)
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, base / WEIGHTS)
    assert compute_model_sha256(base) not in (before, changed)


def test_what_is_loaded_is_what_was_saved(tmp_path):
    first = make_base(tmp_path / "a", "qwen3", seed=1)
    model = load_model(first)
    model.save_pretrained(tmp_path / "b")
    again = load_model(tmp_path / "b")
    assert torch.equal(compute_logits(again), compute_logits(model))  # the same numbers
