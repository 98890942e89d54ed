"""Pruning over a base in 8-bit or nf4: scores, whole runs, resuming, and what is refused."""

import importlib.util
import json
import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from click.testing import CliRunner
from safetensors.torch import load_file

from lpdeploy.cli.main import main
from lpdeploy.criteria import CRITERIA
from lpdeploy.errors import ArtifactError, MissingDependencyError
from lpdeploy.families.groups import list_group_specs
from lpdeploy.models.adapters import attach_lora, get_base_linear, get_lora_weights
from lpdeploy.models.compact import compact
from lpdeploy.models.loading import load_model
from lpdeploy.pruning.scoring import Scorer
from lpdeploy.run_folder import RunFolder
from tests import reference
from tests.helpers import fill_lora, make_text, make_tiny_model
from tests.models.test_quantized import dequantize
from tests.pruning.test_importance import RTOL
from tests.pruning.test_run import StoppedError, run, stop_after

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
WAYS = [
    {"load_in": "8bit"},
    {"load_in": "8bit", "removal": "mask"},
    {"load_in": "4bit", "removal": "mask"},
]
every_way = pytest.mark.parametrize("options", WAYS, ids=lambda o: "-".join(o.values()))
SMALL = [
    "--steps", "4", "--batch-size", "2", "--micro-batch-size", "2", "--seq-len", "16",
    "--prune-every", "1", "--round-to", "4", "--device", "cpu",
]  # fmt: skip


@pytest.fixture
def base(tmp_path):
    return make_tiny_model(
        tmp_path / "base", heads=8, kv_heads=4, hidden_size=64, intermediate_size=64,
        attention_bias=True,
    )  # fmt: skip


@pytest.fixture
def data(tmp_path):
    return make_text(tmp_path / "text.txt")


def invoke(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


@needs_bitsandbytes
@pytest.mark.parametrize("load_in", ["8bit", "4bit"])
def test_scores_are_those_of_the_dequantized_weights(base, load_in):
    model = load_model(base, dtype="fp32", load_in=load_in)
    wrapped = attach_lora(model, rank=4, alpha=8, dropout=0.0, seed=1).train()
    fill_lora(model)
    ids = torch.arange(24).view(2, 12)
    wrapped(input_ids=ids, labels=ids).loss.backward()
    specs = list_group_specs(model.config)
    scores = Scorer(CRITERIA["lora"], model, specs).compute_importance()
    for spec in (specs[0], specs[3]):
        expected = torch.zeros(spec.num_groups, dtype=torch.float64)
        for piece in spec.slices:
            linear = model.get_submodule(piece.module)
            lora = get_lora_weights(linear)
            parts = [dequantize(get_base_linear(linear)), lora.lora_a, lora.lora_b]
            parts += [lora.lora_a.grad, lora.lora_b.grad]
            every = reference.weight_importance(
                *[p.detach().double().tolist() for p in parts], lora.scaling
            )
            groups = reference.group_importance(every, piece.dim, piece.block)
            expected += torch.tensor(groups, dtype=torch.float64)
        torch.testing.assert_close(
            scores[spec.name], expected, rtol=RTOL, atol=0, check_dtype=False
        )


@needs_bitsandbytes
@every_way
def test_a_run_is_stock_and_compacts_to_full_precision(base, data, tmp_path, options, told):
    run(base, tmp_path / "run", data, options=options)
    assert any(f"fp32 over a base in {options['load_in']} (checkpoint fp32)" in s for s in told)
    plan = RunFolder(tmp_path / "run").load_plan()
    run(base, tmp_path / "plain", data)
    plain = load_file(tmp_path / "plain" / "adapter" / "adapter_model.safetensors")
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in adapter.items()} == {
        n: (t.shape, t.dtype) for n, t in plain.items()
    }
    configs = [
        json.loads((tmp_path / name / "adapter" / "adapter_config.json").read_text())
        for name in ("run", "plain")
    ]
    for config in configs:
        config["target_modules"] = sorted(config["target_modules"])  # a set, in any order
    assert configs[0] == configs[1]
    compact(tmp_path / "run")
    merged = load_file(tmp_path / "run" / "model" / "model.safetensors")
    stored = load_file(base / "model.safetensors")
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert "quantization_config" not in config
    # W + scaling B A of the stored weights, not of the quantized ones, whose error is over 1e-3.
    name, kept = "model.layers.0.mlp.up_proj", plan.kept["layers.0.channels"]
    lora = [adapter[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "BA"]
    expected = stored[f"{name}.weight"][kept] + 2 * lora[0] @ lora[1]
    torch.testing.assert_close(merged[f"{name}.weight"], expected, rtol=0, atol=1e-6)  # float32


@needs_bitsandbytes
def test_cutting_and_masking_an_8bit_base_give_the_same_plan(base, data, tmp_path):
    for removal in ("cut", "mask"):
        options = {"load_in": "8bit", "removal": removal, "lora_dropout": 0.0}
        run(base, tmp_path / removal, data, options=options)
    assert (
        RunFolder(tmp_path / "cut").load_plan().kept
        == RunFolder(tmp_path / "mask").load_plan().kept
    )
    cut, mask = (
        load_file(tmp_path / removal / "adapter" / "adapter_model.safetensors")
        for removal in ("cut", "mask")
    )
    for name, tensor in cut.items():  # as in test_run.py
        torch.testing.assert_close(mask[name], tensor, rtol=1e-3, atol=1e-4)


@needs_bitsandbytes
@every_way
def test_a_resumed_run_ends_as_if_never_stopped(base, data, tmp_path, options):
    run(base, tmp_path / "whole", data, options=options)
    with pytest.raises(StoppedError):
        run(base, tmp_path / "run", data, options=options, on_step=stop_after(7))
    with pytest.raises(ArtifactError, match="of another run: load_in was '.bit' and is None now"):
        run(base, tmp_path / "run", data, options={**options, "load_in": None}, resume=True)
    run(base, tmp_path / "run", data, options=options, resume=True)
    for name in ("adapter/adapter_model.safetensors", "importance.safetensors", "plan.json"):
        expected = (tmp_path / "whole" / name).read_bytes()
        assert (tmp_path / "run" / name).read_bytes() == expected


@pytest.fixture
def fresh_accelerate():
    """Let a test choose its precision: accelerate keeps the first of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@needs_bitsandbytes
@pytest.mark.usefixtures("fresh_accelerate")
def test_gradient_checkpointing_and_bf16_train_over_a_quantized_base(base, data, tmp_path):
    for options in (WAYS[0], WAYS[2]):
        extra = {"gradient_checkpointing": True, "dtype": "bf16", "steps": 3, "prune_every": 1}
        result = run(base, tmp_path / options["load_in"], data, options={**options, **extra})
        assert result.achieved["groups"] == 0.5
        path = tmp_path / options["load_in"] / "adapter" / "adapter_model.safetensors"
        trained = [t for name, t in load_file(path).items() if "lora_B" in name]
        assert all(tensor.any() for tensor in trained)  # they start at zero


@pytest.mark.slow
@needs_bitsandbytes
@pytest.mark.parametrize("load_in", ["8bit", "4bit"])
def test_the_command_line_prunes_compacts_and_verifies(base, data, tmp_path, load_in):
    words = ("prune", base, "--data", data, "--output", tmp_path / "run", "--load-in", load_in)
    result = invoke(*words, *SMALL)
    assert result.exit_code == 0, result.output
    assert ("Groups are masked until the end" in result.stderr) == (load_in == "4bit")
    assert f"over a base in {load_in}" in result.stderr
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert "bitsandbytes" in json.dumps(manifest)
    assert invoke("compact", tmp_path / "run").exit_code == 0
    verified = invoke("verify", tmp_path / "run", "--engine", "torch", "--json")
    assert verified.exit_code == 0, verified.output
    assert json.loads(verified.stdout.splitlines()[-1])["ok"] is True
    # The run's own recipe names the removal, and repeats it.
    words = ("--recipe", tmp_path / "run" / "recipe.yaml", "--output", tmp_path / "again")
    again = invoke("prune", base, *words)
    assert again.exit_code == 0, again.output
    assert "masked until the end" not in again.stderr
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (tmp_path / "run" / weights).read_bytes()


def test_cutting_a_4bit_base_is_refused(base, data, tmp_path):
    words = ("prune", base, "--data", data, "--output", tmp_path / "run", *SMALL)
    result = invoke(*words, "--load-in", "4bit", "--removal", "cut")
    assert result.exit_code == 2
    assert "--removal cut cannot go with --load-in 4bit" in " ".join(result.stderr.split())
    assert invoke(*words, "--load-in", "2bit").exit_code == 2
    assert not (tmp_path / "run").exists()


def test_without_bitsandbytes_nothing_is_started(base, data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'lpdeploy\[quant\]'"):
        run(base, tmp_path / "run", data, options={"load_in": "8bit"})
    assert not (tmp_path / "run").exists()


def test_a_quantized_checkpoint_is_refused(base, data, tmp_path):
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="is quantized already, .* Prune the model it was made"):
        run(base, tmp_path / "run", data)
    assert not (tmp_path / "run").exists()
