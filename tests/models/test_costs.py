"""What a pass has to do, against counts of the real products."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lpdeploy.criteria import CRITERIA
from lpdeploy.models.adapters import attach_lora
from lpdeploy.models.costs import (
    compute_decode_bytes,
    compute_prefill_flops,
    compute_scoring_flops,
    compute_training_flops,
)
from lpdeploy.models.loading import load_config, load_model
from tests.helpers import make_tiny_model


@pytest.mark.parametrize(
    "config",
    [
        {"kv_heads": 2},
        {"model_type": "lpdeploy_llama", "layer_widths": [[3, 40], [1, 24]]},
    ],
    ids=["grouped", "per-layer"],
)
def test_operations_equal_those_that_torch_counts(tmp_path, config):
    folder = make_tiny_model(tmp_path / "m", **config)
    model = load_model(folder)
    model.set_attn_implementation("eager")
    batch, tokens = 3, 10
    ids = torch.ones(batch, tokens, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids, logits_to_keep=1, use_cache=False)
    # Eager attention computes the half above the diagonal too, which a causal kernel skips.
    loaded = load_config(folder)
    own = compute_prefill_flops(loaded, tokens=tokens, batch=batch)
    longer = compute_prefill_flops(loaded, tokens=2 * tokens, batch=batch)
    head = 2 * batch * loaded.hidden_size * loaded.vocab_size
    # Linear in T but for attention: what doubling T adds beyond doubling is 2 x attention's share.
    attention = (longer - head - 2 * (own - head)) / 2
    rotation = 2 * batch * tokens * loaded.head_dim / 2  # transformers' product of the angles
    counted = counter.get_total_flops() - attention
    assert own == pytest.approx(counted, abs=2 * rotation)


def test_lora_adds_two_thin_products_a_projection(tmp_path):
    config = load_config(make_tiny_model(tmp_path / "m"))
    plain = compute_prefill_flops(config, tokens=5, batch=1)
    beside = compute_prefill_flops(config, tokens=5, batch=1, rank=4)
    # q, k, v, o: 32 + 32; gate, up, down: 32 + 48; two layers.
    assert beside - plain == 2 * 5 * 4 * 2 * (4 * 64 + 3 * 80)


def test_a_decoded_token_reads_weights_and_cache(tmp_path):
    config = load_config(make_tiny_model(tmp_path / "m", kv_heads=2))
    read = compute_decode_bytes(config, context=7, batch=3, weight_bytes=1000, cache_itemsize=2)
    # keys and values of 2 layers x 2 heads x 8 numbers x 7 tokens x 3 rows, 2 bytes each
    assert read == 1000 + 2 * 2 * 2 * 8 * 7 * 3 * 2


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("weight_gradients", [False, True])
def test_operations_of_a_step_equal_those_that_torch_counts(
    tmp_path, weight_gradients, checkpointing
):
    folder = make_tiny_model(tmp_path / "m", kv_heads=2)
    model, config = load_model(folder), load_config(folder)
    model.set_attn_implementation("eager")
    wrapped = attach_lora(model, rank=4, alpha=8, dropout=0.0, seed=0).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for name, parameter in model.named_parameters():
        if weight_gradients and "base_layer" in name:
            parameter.requires_grad = True
    batch, tokens = 3, 10
    ids = torch.ones(batch, tokens, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        wrapped(input_ids=ids, labels=ids).loss.backward()
    own = compute_training_flops(
        config, tokens=tokens, batch=batch, rank=4,
        weight_gradients=weight_gradients, checkpointing=checkpointing,
    )  # fmt: skip
    # Eager attention computes both halves, and keeps the scores that a fused backward pass makes
    # again: of its products of 2 T T each, two forward and four backward.
    passes = 2 if checkpointing else 1
    attention = batch * tokens**2 * 2 * 32  # layers, heads x head_dim
    eager, fused = 2 * (2 * passes + 4) * attention, (2 * passes + 5) * attention
    rotation = 2 * batch * tokens * config.head_dim / 2  # transformers' product of the angles
    assert own == pytest.approx(counter.get_total_flops() - eager + fused, abs=2 * rotation)


def test_scoring_costs_its_products_a_weight(tmp_path):
    config = load_config(make_tiny_model(tmp_path / "m"))
    weights = 2 * (4 * 32 * 32 + 3 * 32 * 48)
    by_criterion = {
        name: compute_scoring_flops(config, rank=4, criterion=CRITERIA[name]) / weights
        for name in ("lora", "gradient", "magnitude", "wanda", "gate", "random")
    }
    # B A of rank 4, Eq. 10's factor of rank 8, two operations each; then four for a weight.
    assert by_criterion == {
        "lora": 28, "gradient": 12, "magnitude": 12, "wanda": 12, "gate": 0, "random": 0,
    }  # fmt: skip
