"""The torch runner against transformers called by hand, without its cache."""

import shutil

import pytest
import torch

from lpdeploy.engines.torch.runner import TorchRunner, load_torch_runner
from lpdeploy.errors import ArtifactError
from lpdeploy.models.adapters import get_lora_weights, load_unmerged
from lpdeploy.models.loading import load_model
from tests.helpers import (
    compute_reference,
    make_adapter,
    make_batch,
    make_tiny_model,
    run_with_cache,
)

# The same kernels over other shapes: float32 rounding of logits up to 10.
ATOL = 2e-5
SHAPES = {
    "llama": {},
    "grouped": {"kv_heads": 2},
    "per-layer": {"model_type": "lpdeploy_llama", "layer_widths": [[3, 40], [1, 24]]},
    "odd-heads-window": {"model_type": "mistral", "heads": 3, "sliding_window": 6},
    "qwen2": {"model_type": "qwen2", "kv_heads": 2},
    "qwen3": {"model_type": "qwen3", "kv_heads": 1},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("lengths", [[9, 4, 11], [11]], ids=["batch", "single"])
def test_logits_equal_transformers(tmp_path, shape, lengths):
    folder = make_tiny_model(tmp_path / "model", **shape)
    model = load_model(folder)
    ids, mask = make_batch(lengths, vocab_size=72)
    expected = compute_reference(model, ids, mask)[mask.bool()]
    runner = load_torch_runner(folder)
    assert expected.abs().max() > 2
    for chunks in ([11], [7, 1, 1, 2]):
        logits = run_with_cache(runner, ids, mask, chunks=chunks)
        torch.testing.assert_close(logits, expected, atol=ATOL, rtol=0)


def test_adapter_stays_unmerged(tmp_path):
    folder = make_tiny_model(tmp_path / "model", kv_heads=2)
    adapter = make_adapter(folder, tmp_path / "adapter")
    ids, mask = make_batch([5, 8], vocab_size=72)
    runner = load_torch_runner(folder, adapter=adapter)
    merged = load_unmerged(load_model(folder), adapter).merge_and_unload()
    logits = run_with_cache(runner, ids, mask, chunks=[6, 1, 1])
    # Twice the roundings: W x + s B A x against (W + s B A) x.
    expected = compute_reference(merged, ids, mask)[mask.bool()]
    torch.testing.assert_close(logits, expected, atol=2 * ATOL, rtol=0)
    base = compute_reference(load_model(folder), ids, mask)[mask.bool()]
    assert (logits - base).abs().max() > 0.1


@pytest.mark.parametrize("past_kind", [{}, {"model_type": "mistral", "sliding_window": 4}])
def test_several_calls_go_on_from_one_past(tmp_path, past_kind):
    runner = load_torch_runner(make_tiny_model(tmp_path / "model", **past_kind))
    ids, mask = make_batch([7, 5], vocab_size=72)
    past = runner.forward(ids[:, :6], attention_mask=mask[:, :6]).past
    first, second = (
        runner.forward(ids[:, 6:], attention_mask=mask, past=past).logits for _ in range(2)
    )
    assert torch.equal(first, second)


def test_what_a_runner_says_of_itself(tmp_path):
    runner = load_torch_runner(make_tiny_model(tmp_path / "model"))
    assert (runner.name, runner.precision) == ("torch", "fp32")
    assert (runner.vocab_size, runner.max_positions) == (72, 128)
    assert runner.config is runner.model.config


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_lora_follows_the_precision_and_rotary_angles_do_not(tmp_path, precision):
    folder = make_tiny_model(tmp_path / "model")
    adapter = make_adapter(folder, tmp_path / "adapter")
    runner = load_torch_runner(folder, dtype=precision, adapter=adapter)
    base = runner.model.get_base_model()
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    assert runner.precision == precision
    assert get_lora_weights(base.model.layers[0].mlp.up_proj).lora_b.dtype == dtype
    assert base.model.rotary_emb.inv_freq.dtype == torch.float32
    ids, mask = make_batch([4, 6], vocab_size=72)
    logits = run_with_cache(runner, ids, mask, chunks=[5, 1])
    full = load_torch_runner(folder, adapter=adapter)
    expected = run_with_cache(full, ids, mask, chunks=[5, 1])
    # A few dozen roundings to 11 or 8 bits on the way to logits up to 10.
    atol = {"fp16": 0.05, "bf16": 0.4}[precision]
    torch.testing.assert_close(logits, expected, atol=atol, rtol=0)


def test_auto_runs_a_half_precision_checkpoint_in_fp32_on_a_cpu(tmp_path):
    folder = make_tiny_model(tmp_path / "model")
    load_model(folder, dtype="bf16").save_pretrained(folder)
    assert load_torch_runner(folder).precision == "fp32"
    assert load_torch_runner(folder, dtype="bf16").precision == "bf16"


def test_a_peft_model_in_memory(tmp_path):
    folder = make_tiny_model(tmp_path / "model")
    adapter = make_adapter(folder, tmp_path / "adapter")
    ids, mask = make_batch([3], vocab_size=72)
    runner = TorchRunner(load_unmerged(load_model(folder), adapter))
    loaded = load_torch_runner(folder, adapter=adapter)
    a, b = (r.forward(ids, attention_mask=mask).logits for r in (runner, loaded))
    assert torch.equal(a, b)


def test_adapter_of_another_shape(tmp_path):
    folder = make_tiny_model(tmp_path / "model")
    other = make_tiny_model(tmp_path / "other", intermediate_size=40)
    adapter = make_adapter(other, tmp_path / "adapter")
    with pytest.raises(ArtifactError, match=r"does not fit the model.*cut to the same plan"):
        load_torch_runner(folder, adapter=adapter)


def test_adapter_that_is_none(tmp_path):
    folder = make_tiny_model(tmp_path / "model")
    adapter = make_adapter(folder, tmp_path / "adapter")
    shutil.move(adapter / "adapter_config.json", tmp_path)
    with pytest.raises(ArtifactError, match=r"No adapter_config.json in"):
        load_torch_runner(folder, adapter=adapter)
