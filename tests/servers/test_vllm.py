"""The folder of vLLM, opened by a server that needs no GPU: transformers serve."""

import json
import sys

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from lpdeploy.errors import ArtifactError, LpdeployError
from lpdeploy.servers.package import package
from tests.helpers import make_tiny_model
from tests.models.families import edit_json
from tests.servers.models import PROMPT, TOKENS, generate, make_demo_run
from tests.servers.serving import complete, serve


def package_for_vllm(model, output, **options):
    return package(str(model), kind="vllm", output=output, **options).to_json()


def test_the_folder_is_the_checkpoint_with_what_ends_a_text(tmp_path):
    model = make_tiny_model(tmp_path / "model")
    (model / "generation_config.json").unlink()
    package_for_vllm(model, tmp_path / "out")
    for path in model.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == 2


def test_weights_take_no_room_and_what_people_edit_is_a_copy(tmp_path):
    model = make_tiny_model(tmp_path / "model")
    package_for_vllm(model, tmp_path / "out")
    for name, shared in (("model.safetensors", True), ("config.json", False)):
        assert (tmp_path / "out" / name).samefile(model / name) is shared


def test_a_checkpoint_in_shards(tmp_path):
    from transformers import LlamaForCausalLM

    model = make_tiny_model(tmp_path / "model")
    LlamaForCausalLM.from_pretrained(model).save_pretrained(model, max_shard_size="20KB")
    (model / "model.safetensors").unlink()
    files = package_for_vllm(model, tmp_path / "out")["files"]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) <= set(files)


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        ({}, {}, "--dtype float32 --max-model-len 128"),
        ({"dtype": "bfloat16"}, {"max_seq_len": 64}, "--dtype bfloat16 --max-model-len 64"),
        ({}, {"tensor_parallel": 4},
         "--dtype float32 --max-model-len 128 --tensor-parallel-size 4"),
    ],
)  # fmt: skip
def test_the_command(tmp_path, config, options, words):
    model = make_tiny_model(tmp_path / "model")
    edit_json(model / "config.json", **config)
    result = package_for_vllm(model, tmp_path / "out", **options)
    assert result["command"] == f"vllm serve {tmp_path / 'out'} {words}"
    readme = (tmp_path / "out" / "README.md").read_text()
    assert result["command"] in readme
    assert f"--model /model --served-model-name out {words}" in readme


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ranks"), [(4, 4, [1, 2, 4]), (3, 3, [1]), (8, 2, [1, 2, 4, 8])]
)
def test_how_many_gpus_the_heads_allow(tmp_path, heads, kv_heads, ranks):
    model = make_tiny_model(
        tmp_path / "model", model_type="mistral", heads=heads, kv_heads=kv_heads
    )
    result = package_for_vllm(model, tmp_path / "out")
    assert result["tensor_parallel"] == ranks
    words = f"`--tensor-parallel-size` {', '.join(map(str, ranks))}." if len(ranks) > 1 else "at 1."
    assert words in (tmp_path / "out" / "README.md").read_text()


def test_what_is_missing_or_out_of_range(tmp_path):
    model = make_tiny_model(tmp_path / "model")
    with pytest.raises(LpdeployError, match="`max_seq_len` 129 does not fit .* Use 2 to 128"):
        package_for_vllm(model, tmp_path / "out", max_seq_len=129)
    for path in model.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ArtifactError, match="has no tokenizer. Copy its tokenizer files beside"):
        package_for_vllm(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_transformers_serve_gives_the_tokens_of_generate(tmp_path):
    pytest.importorskip("fastapi", reason="lpdeploy[serve] is not installed")
    pytest.importorskip("uvicorn", reason="lpdeploy[serve] is not installed")
    pytest.importorskip("openai", reason="lpdeploy[serve] is not installed")
    run = make_demo_run(tmp_path / "run")
    folder = tmp_path / "out"
    package_for_vllm(run, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = generate(run / "model", tokenizer(PROMPT).input_ids)
    command = [
        sys.executable, "-m", "transformers.cli.transformers", "serve", folder, "--dtype",
        "float32", "--device", "cpu", "--host", "127.0.0.1", "--port", "PORT",
    ]  # fmt: skip
    with serve(command, tmp_path / "log.txt", seconds=120) as address:
        answer = complete(address, model=folder, prompt=PROMPT, tokens=TOKENS)
    assert answer["usage"]["completion_tokens"] == TOKENS
    assert answer["choices"][0]["text"] == tokenizer.decode(expected, skip_special_tokens=True)
    assert torch.tensor(expected).unique().numel() > 4  # not one token over and over
