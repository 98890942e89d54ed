"""verify must pass what is equal and must fail what is not."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lpdeploy.config import PruneConfig
from lpdeploy.engines import verify as verifying
from lpdeploy.engines.export import export
from lpdeploy.engines.stages import add_rounding_noise
from lpdeploy.engines.torch.runner import load_torch_runner
from lpdeploy.engines.verify import build_inputs, collect_logits, verify
from lpdeploy.errors import ArtifactError
from lpdeploy.folders import FOLDER_RECORD, atomic_folder
from lpdeploy.models.compact import compact
from lpdeploy.pruning.run import prune
from tests.helpers import make_text, make_tiny_model

pytestmark = pytest.mark.slow

OPTIONS = PruneConfig(
    steps=2, batch_size=2, micro_batch_size=2, seq_len=16, lr=1e-2, prune_every=1, prune_warmup=0.0,
    round_to=4, device="cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    base = make_tiny_model(folder / "base", heads=4, kv_heads=2, num_hidden_layers=1)
    data = make_text(folder / "text.txt")
    prune(str(base), folder / "run", data=str(data), options=OPTIONS)
    compact(folder / "run")
    compact(folder / "run", keep_adapter=True)
    return folder / "run"


def names(pairs):
    return [(pair.a, pair.b) for pair in pairs]


def test_all_stages_of_a_run_are_equal(run):
    export(str(run))
    export(str(run), unmerged=True)
    pairs = verify(run).pairs
    assert names(pairs) == [
        ("masked/torch", "cut/torch"),
        ("cut/torch", "unmerged/torch"),
        ("unmerged/torch", "onnx-unmerged"),
        ("cut/torch", "merged/torch"),
        ("merged/torch", "compact/torch"),
        ("compact/torch", "onnx"),
    ]
    assert all(pair.ok for pair in pairs)
    assert all(pair.max_abs_logit > 1 for pair in pairs)  # a comparison of zeros proves nothing
    assert json.loads((run / "verify.json").read_text())["ok"] is True
    with pytest.raises(ArtifactError, match=r"no trt export .*lpdeploy export .* --engine trt' fi"):
        verify(run, engine="trt")
    without = verify(run, engine="torch").pairs
    assert all("onnx" not in name for pair in names(without) for name in pair)


def test_a_model_folder_and_its_export_are_equal(tmp_path):
    model = make_tiny_model(tmp_path / "model", num_hidden_layers=1)
    with pytest.raises(ArtifactError, match="only one stage .* Run 'lpdeploy export"):
        verify(model)
    export(str(model))
    pairs = verify(model).pairs
    assert names(pairs) == [("torch", "onnx")]
    assert pairs[0].ok


def damage(model, change):
    path = model / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def swap_two_channels(tensors):
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = tensors[name][:, [1, 0, *range(2, tensors[name].shape[1])]].contiguous()


def nudge_one_weight(tensors):
    tensors["model.layers.0.self_attn.o_proj.weight"][0, 0] += 0.05


def overflow(tensors):
    tensors["model.norm.weight"][:] = 3e38  # which every logit then exceeds: infinity, or NaN


@pytest.mark.parametrize("change", [swap_two_channels, nudge_one_weight, overflow])
def test_a_damaged_stage_is_found(run, change, tmp_path):
    whole = tmp_path / "whole"
    shutil.copytree(run / "model", whole)
    try:
        # As if compact itself had written wrong weights, so that the hashes are right.
        with atomic_folder(run / "model", kind="model", overwrite=True) as new:
            shutil.copytree(whole, new, dirs_exist_ok=True)
            (new / FOLDER_RECORD).unlink()
            damage(new, change)
        wrong = [pair for pair in verify(run, engine="torch").pairs if not pair.ok]
        assert names(wrong) == [("merged/torch", "compact/torch")]
    finally:
        shutil.rmtree(run / "model")
        whole.rename(run / "model")


def test_the_tolerance_can_be_given(run):
    assert not any(pair.ok for pair in verify(run, engine="torch", atol=-1.0).pairs)


def test_inputs_fit_a_model_of_few_positions():
    rows = build_inputs(100, limit=16)
    assert max(len(row) for row in rows) <= 16
    assert len({len(row) for row in rows}) > 1
    assert all(0 <= token < 100 for row in rows for token in row)


def sharpen(tensors):
    """Let attention amplify rounding: a softmax of large scores is sensitive to each of them."""
    for name in tensors:
        if "q_proj" in name or "k_proj" in name:
            tensors[name] *= 30


def test_random_rounding_changes_as_much_as_another_order_of_sums(tmp_path):
    folder = make_tiny_model(tmp_path / "model", heads=4, kv_heads=2)
    runner = load_torch_runner(folder, dtype="fp32")
    rows = build_inputs(runner.vocab_size, limit=64)
    plain = collect_logits(runner, rows)
    changes = []
    for seed in (0, 0, 1):
        with add_rounding_noise(runner, seed=seed):
            changes.append(collect_logits(runner, rows) - plain)
    assert torch.equal(changes[0], changes[1])
    assert not torch.equal(changes[0], changes[2])
    assert torch.equal(collect_logits(runner, rows), plain)  # nothing is left behind
    runner.model.double()
    exact = (collect_logits(runner, rows) - plain).abs().max()
    assert exact < changes[0].abs().max() < 20 * exact


@pytest.fixture(scope="module")
def sharp_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharp")
    base = make_tiny_model(folder / "base", heads=4, kv_heads=2, num_hidden_layers=4)
    damage(base, sharpen)
    # With this start, these few steps leave a model that amplifies.
    options = replace(OPTIONS, lora_init="peft")
    prune(str(base), folder / "run", data=str(make_text(folder / "text.txt")), options=options)
    compact(folder / "run")
    export(str(folder / "run"))
    return folder / "run"


def test_a_model_that_amplifies_rounding_passes(sharp_run, monkeypatch):
    result = verify(sharp_run)
    assert result.ok
    assert any(pair.tolerance > 2e-5 * pair.max_abs_logit for pair in result.pairs)
    monkeypatch.setattr(verifying, "_measure_noise", lambda *_: 0.0)
    assert not verify(sharp_run).ok


def test_a_fault_in_a_model_that_amplifies_rounding_is_found(sharp_run, tmp_path):
    shutil.copytree(sharp_run, tmp_path / "run")
    with atomic_folder(tmp_path / "run" / "model", kind="model", overwrite=True) as new:
        shutil.copytree(sharp_run / "model", new, dirs_exist_ok=True)
        (new / FOLDER_RECORD).unlink()
        damage(new, swap_two_channels)
    assert "merged/torch" in [
        p.a for p in verify(tmp_path / "run", engine="torch").pairs if not p.ok
    ]


def test_a_bf16_checkpoint_is_the_merged_model_rounded(tmp_path):
    base = make_tiny_model(tmp_path / "base", heads=4)
    damage(base, lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
    config = json.loads((base / "config.json").read_text()) | {"dtype": "bfloat16"}
    (base / "config.json").write_text(json.dumps(config))
    data = make_text(tmp_path / "text.txt")
    prune(str(base), tmp_path / "run", data=str(data), options=OPTIONS)
    compact(tmp_path / "run")
    stored = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    result = verify(tmp_path / "run", engine="torch")
    assert result.ok
    *_, rounded, stored = result.pairs
    assert (rounded.a, rounded.b) == ("merged/torch", "rounded/torch")
    assert rounded.tolerance is None
    assert rounded.max_abs_diff > 1e-4  # the weights really were rounded to bf16 once more
    assert stored.max_abs_diff <= stored.tolerance < rounded.max_abs_diff / 2
