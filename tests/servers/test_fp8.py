"""The FP8 checkpoint of a package for vLLM, unpacked by plain arithmetic.

tests/slow/servers/test_servers.py opens it with the library that vLLM reads it with.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from lpdeploy.errors import ArtifactError, LpdeployError
from lpdeploy.servers.fp8 import round_rows
from lpdeploy.servers.package import package
from tests.helpers import make_tiny_model
from tests.models.families import make_base

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def package_fp8(model, output, **options):
    return package(str(model), kind="vllm", output=output, precision="fp8", **options).to_json()


def load_all(folder):
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama-gqa", torch.float32), ("llama-bias", torch.bfloat16), ("qwen3", torch.float16)],
)
def test_every_weight_is_the_checkpoints_rounded(tmp_path, family, dtype):
    model = make_base(tmp_path / "model", family, dtype=dtype)
    result = package_fp8(model, tmp_path / "out")
    assert result["precision"] == "fp8"
    stored, written = load_all(model), load_all(tmp_path / "out")
    rounded = {name for name in stored if name.split(".")[-2] in PROJECTIONS and "weight" in name}
    assert len(rounded) == 2 * len(PROJECTIONS)
    assert written.keys() == stored.keys() | {f"{name}_scale" for name in rounded}
    for name, tensor in stored.items():
        if name not in rounded:
            assert torch.equal(written[name], tensor)
            continue
        numbers, scale = written[name], written[f"{name}_scale"]
        assert (numbers.dtype, numbers.shape) == (torch.float8_e4m3fn, tensor.shape)
        assert (scale.dtype, scale.shape) == (dtype, (len(tensor), 1))
        steps = tensor.double() / scale.double()
        # Three bits of fraction: half a step of 2^-3 of a number, and of 2^-9 below 2^-6. The
        # largest may pass the end of the range as far as the scale was rounded.
        bound = steps.abs().clamp(min=2**-6) * 2**-4
        assert ((numbers.double() - steps).abs() <= bound).all()
        assert numbers.float().abs().max() == 448 or dtype != torch.float32


def test_the_config_says_how_it_is_stored(tmp_path):
    model = make_tiny_model(tmp_path / "model")
    package_fp8(model, tmp_path / "out")
    before, config = (
        json.loads((folder / "config.json").read_text()) for folder in (model, tmp_path / "out")
    )
    added = config.pop("quantization_config")
    assert config == before
    assert added["quant_method"] == "compressed-tensors"
    assert added["format"] == "float-quantized"
    assert added["ignore"] == ["lm_head"]
    (group,) = added["config_groups"].values()
    assert group["weights"] == {
        "num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False,
    }  # fmt: skip
    assert group["input_activations"]["strategy"] == "token"
    assert group["input_activations"]["dynamic"] is True


def test_shards_and_their_index(tmp_path):
    model = make_tiny_model(tmp_path / "model")
    LlamaForCausalLM.from_pretrained(model).save_pretrained(model, max_shard_size="20KB")
    (model / "model.safetensors").unlink()
    package_fp8(model, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    written = {
        name: path.name
        for path in (tmp_path / "out").glob("*.safetensors")
        for name in load_file(path)
    }
    assert index["weight_map"] == written
    assert len(set(written.values())) > 1
    total = sum(tensor.nbytes for tensor in load_all(tmp_path / "out").values())
    assert index["metadata"]["total_size"] == total


def test_a_row_of_zeros_and_one_too_small_for_its_type():
    weight = torch.zeros(3, 4, dtype=torch.float16)
    weight[1, 2] = 6e-8  # its scale would be zero
    weight[2] = torch.tensor([1.0, -2.0, 0.5, 0.0])
    numbers, scale = round_rows(weight)
    assert numbers.float().isfinite().all()
    assert (scale > 0).all()
    assert torch.equal(numbers[0].float(), torch.zeros(4))
    assert (numbers[2].float() * scale[2].float()).allclose(weight[2].float(), rtol=2**-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_of_small_numbers_keep_their_digits(dtype):
    rows = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    rows = rows / rows.abs().amax(1, keepdim=True)
    weight = (rows * torch.tensor([1.0, 1e-2, 1e-3, 3e-4, 1e-4, 5e-5])[:, None]).to(dtype)
    numbers, scale = round_rows(weight)
    error = (numbers.float() * scale.float() - weight.float()).abs().amax(1)
    # Half a step of E4M3, whose numbers have three bits after the first, and the scale's rounding.
    assert (error <= (2**-4 + 2**-8) * weight.float().abs().amax(1)).all()


def test_what_is_refused(tmp_path):
    model = make_tiny_model(tmp_path / "model")
    with pytest.raises(
        LpdeployError,
        match="`target=vllm` does not write `precision=int4`. Use `precision=fp8`, or leave",
    ):
        package(str(model), kind="vllm", output=tmp_path / "out", precision="int4")
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=f"{name} holds NaN or infinity"):
        package_fp8(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_readme_says_what_else_reads_it(tmp_path):
    package_fp8(make_tiny_model(tmp_path / "model"), tmp_path / "out")
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "projections in fp8, in the format of compressed-tensors" in readme
    assert "pip install compressed-tensors" in readme
    assert "8.9 and newer" in readme
