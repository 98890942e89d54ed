"""Cutting a live model: the same function, gradients and training as the masked whole one."""

import copy

import pytest
import torch
from torch import nn

from lpdeploy.families.groups import list_group_specs
from lpdeploy.models.adapters import attach_lora, get_base_linear, get_lora_weights
from lpdeploy.models.cutting import apply_cut, apply_cut_to_optimizer, apply_masks
from lpdeploy.models.loading import load_model
from tests.helpers import fill_lora
from tests.models.families import (
    FAMILIES,
    TOKENS,
    choose_kept,
    compute_logits,
    decode,
    list_positions,
)

every_family = pytest.mark.parametrize("family", FAMILIES)
# Where only names, indices and shapes count: without biases, with all of them, and head_dim 4.
some_families = pytest.mark.parametrize("family", ["llama-gqa", "llama-bias", "qwen2"])

# float32 adds the terms that stay in another order: a few 2**-24 of logits up to 5, over two
# layers; 1e-6 was measured. A wrong row or column changes logits by more than 0.1.
CLOSE = {"rtol": 0, "atol": 1e-5}
# The same of gradients up to 0.4; 2e-7 was measured.
CLOSE_GRADIENTS = {"rtol": 0, "atol": 2e-6}


def build_pair(base, kept):
    """Return (cut, masked): the same model and adapter, as (peft model, model, specs)."""
    model = load_model(base)
    wrapped = attach_lora(model, rank=4, alpha=8, dropout=0.0, seed=1).eval()
    fill_lora(model)
    specs = list_group_specs(model.config)
    masked = copy.deepcopy(wrapped)
    apply_cut(model, specs, as_tensors(kept))
    apply_masks(masked.get_base_model(), specs, as_masks(specs, kept))
    return wrapped, masked, specs


def as_tensors(kept):
    return {name: torch.tensor(indices) for name, indices in kept.items()}


def as_masks(specs, kept):
    return {
        spec.name: torch.tensor([g in kept[spec.name] for g in range(spec.num_groups)])
        for spec in specs
    }


def build_lora(base, *, dtype="auto"):
    model = load_model(base, dtype=dtype)
    wrapped = attach_lora(model, rank=4, alpha=8, dropout=0.0, seed=1).eval()
    fill_lora(model)
    return wrapped, model, list_group_specs(model.config)


@every_family
def test_cutting_equals_masking(bases, family):
    kept = choose_kept(bases(family), heads=[3, 2], channels=[20, 31])
    cut, masked, _ = build_pair(bases(family), kept)
    expected = compute_logits(masked)
    assert (expected - compute_logits(build_lora(bases(family))[0])).abs().max() > 0.1
    torch.testing.assert_close(compute_logits(cut), expected, **CLOSE)


@every_family
def test_cached_decoding_of_the_cut_model_equals_the_masked_whole(bases, family):
    kept = choose_kept(bases(family), heads=[1, 3], channels=[31, 20])
    cut, masked, _ = build_pair(bases(family), kept)
    expected = compute_logits(masked)
    torch.testing.assert_close(decode(masked), expected, **CLOSE)
    torch.testing.assert_close(decode(cut), expected, **CLOSE)


@some_families
def test_the_cut_model_generates_the_same_tokens(bases, family):
    kept = choose_kept(bases(family), heads=2, channels=20)
    cut, masked, _ = build_pair(bases(family), kept)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    tokens = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
    assert (
        cut.generate(**tokens, **options).tolist() == masked.generate(**tokens, **options).tolist()
    )


@pytest.mark.parametrize("family", ["llama-gqa", "qwen3"])
def test_cutting_a_bf16_model_equals_masking_to_its_precision(bases, family):
    kept = choose_kept(bases(family, torch.bfloat16), heads=3, channels=20)
    cut, masked, _ = build_pair(bases(family, torch.bfloat16), kept)
    assert (
        cut.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight.dtype == torch.bfloat16
    )
    expected = compute_logits(masked).float()
    # An activation rounds to 8 bits; a sum in another order may fall on the other side.
    atol = 2**-7 * expected.abs().max().item()
    torch.testing.assert_close(compute_logits(cut).float(), expected, rtol=0, atol=atol)


@every_family
def test_masked_groups_get_no_gradient(bases, family):
    kept = choose_kept(bases(family), heads=[3, 2], channels=[20, 31])
    wrapped, model, specs = build_lora(bases(family))
    apply_masks(model, specs, as_masks(specs, kept))
    for parameter in wrapped.parameters():
        parameter.requires_grad_(True)
    wrapped(TOKENS, labels=TOKENS).loss.backward()
    for spec in specs:
        gone = [g for g in range(spec.num_groups) if g not in kept[spec.name]]
        for piece in spec.slices:
            linear = model.get_submodule(piece.module)
            base, lora = get_base_linear(linear), get_lora_weights(linear)
            parts = [base.weight, lora.lora_b if piece.dim == 0 else lora.lora_a]
            if piece.dim == 0 and base.bias is not None:
                parts.append(base.bias)
            for part in parts:
                gradient = part.grad.movedim(piece.dim, 0)
                # Exactly zero: the mask multiplies it by zero on the way back.
                assert not gradient[list_positions(gone, piece.block)].any()
                assert gradient[list_positions(kept[spec.name], piece.block)].any()


@every_family
def test_the_gradients_of_the_cut_model_are_those_of_the_masked_one(bases, family):
    kept = choose_kept(bases(family), heads=[3, 2], channels=[20, 31])
    cut, masked, specs = build_pair(bases(family), kept)
    cut(TOKENS, labels=TOKENS).loss.backward()
    masked(TOKENS, labels=TOKENS).loss.backward()
    for small, full in pair_factors(cut, masked, specs, kept, lambda p: p.grad):
        torch.testing.assert_close(small, full, **CLOSE_GRADIENTS)


def pair_factors(cut, masked, specs, kept, read):
    """List what ``read`` gives of each LoRA factor: of the cut model, and its part of the whole."""
    pairs = []
    for spec in specs:
        for piece in spec.slices:
            small = get_lora_weights(cut.get_base_model().get_submodule(piece.module))
            full = get_lora_weights(masked.get_base_model().get_submodule(piece.module))
            positions = list_positions(kept[spec.name], piece.block)
            if piece.dim == 0:
                pairs += [(read(small.lora_a), read(full.lora_a))]
                pairs += [(read(small.lora_b), read(full.lora_b)[positions])]
            else:
                pairs += [(read(small.lora_a), read(full.lora_a)[:, positions])]
                pairs += [(read(small.lora_b), read(full.lora_b))]
    return pairs


@some_families
def test_every_width_that_a_linear_states_is_the_width_it_has(bases, family):
    kept = choose_kept(bases(family), heads=[3, 2], channels=[20, 31])
    cut, _, _ = build_pair(bases(family), kept)
    checked = 0
    for module in cut.modules():
        if isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == module.weight.shape
            assert module.bias is None or module.bias.shape == (module.out_features,)
            checked += 1
        elif hasattr(module, "base_layer"):
            assert module.out_features == module.base_layer.out_features
            assert module.in_features == module.base_layer.in_features
    assert checked == 2 * 7 * 3 + 1  # base, lora_a and lora_b of each projection, and the head


@some_families
def test_cutting_twice_equals_cutting_once(bases, family):
    first = choose_kept(bases(family), heads=3, channels=31, seed=1)
    second = {  # positions among those that the first cut left
        name: [p for p in range(len(indices)) if p % 3 != 1] for name, indices in first.items()
    }
    composed = {name: [first[name][p] for p in stay] for name, stay in second.items()}
    _, twice, specs = build_lora(bases(family))
    apply_cut(twice, specs, as_tensors(first))
    apply_cut(twice, specs, as_tensors(second))
    _, once, _ = build_lora(bases(family))
    apply_cut(once, specs, as_tensors(composed))
    assert_same_state(twice, once)


def assert_same_state(model, other):
    state, expected = model.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name]), name  # cutting computes nothing


@some_families
def test_keeping_all_changes_nothing(bases, family):
    _, model, specs = build_lora(bases(family))
    expected = copy.deepcopy(model)
    apply_cut(model, specs, {s.name: torch.arange(s.num_groups) for s in specs})
    assert_same_state(model, expected)


def test_only_the_named_specs_are_cut(bases):
    _, model, specs = build_lora(bases("llama-gqa"))
    before = copy.deepcopy(model.state_dict())
    replaced = apply_cut(model, specs, {"layers.1.channels": torch.tensor([3, 4])})
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    mlp = "model.layers.1.mlp."
    assert changed == {
        f"{mlp}gate_proj.base_layer.weight", f"{mlp}gate_proj.lora_B.default.weight",
        f"{mlp}up_proj.base_layer.weight", f"{mlp}up_proj.lora_B.default.weight",
        f"{mlp}down_proj.base_layer.weight", f"{mlp}down_proj.lora_A.default.weight",
    }  # fmt: skip
    assert len(replaced) == 3  # frozen weights are not trained


def test_weights_that_are_trained_are_returned_too(bases):
    _, model, specs = build_lora(bases("llama-bias"))
    model.requires_grad_(True)
    before = dict(model.named_parameters())
    replaced = apply_cut(model, specs, {"layers.1.channels": torch.tensor([3, 4])})
    after = dict(model.named_parameters())
    changed = {before[name]: after[name] for name in after if after[name] is not before[name]}
    assert len(changed) > 6  # three weights with a factor of LoRA each, and the biases
    assert {cut.old: cut.new for cut in replaced} == changed


def test_a_model_without_lora_is_cut_too(bases):
    model = load_model(bases("llama-bias"))
    masked = copy.deepcopy(model)
    specs = list_group_specs(model.config)
    kept = choose_kept(bases("llama-bias"), heads=3, channels=20)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert apply_cut(model, specs, as_tensors(kept)) == []
    apply_masks(masked, specs, as_masks(specs, kept))
    torch.testing.assert_close(compute_logits(model), compute_logits(masked), **CLOSE)


@some_families
def test_removing_the_handles_gives_the_function_back(bases, family):
    wrapped, model, specs = build_lora(bases(family))
    before = compute_logits(wrapped)
    kept = choose_kept(bases(family), heads=1, channels=5)
    handles = apply_masks(model, specs, as_masks(specs, kept))
    assert len(handles) == len(specs)
    assert (compute_logits(wrapped) - before).abs().max() > 0.1
    for handle in handles:
        handle.remove()
    assert torch.equal(compute_logits(wrapped), before)  # the same operations on the same numbers


def test_only_the_named_specs_are_masked(bases):
    wrapped, model, specs = build_lora(bases("llama-mha"))
    before = compute_logits(wrapped)
    assert len(apply_masks(model, specs, {"layers.0.heads": torch.ones(4, dtype=torch.bool)})) == 1
    assert torch.equal(compute_logits(wrapped), before)  # a mask of ones multiplies by one


def list_trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def step(model, optimizer, *, seed):
    tokens = torch.randint(3, 60, (2, 10), generator=torch.Generator().manual_seed(seed))
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@some_families
def test_the_optimizer_keeps_its_part_of_the_moments(bases, family):
    wrapped, model, specs = build_lora(bases(family))
    optimizer = torch.optim.AdamW(list_trainable(wrapped), lr=1e-2, amsgrad=True)
    step(wrapped, optimizer, seed=1)
    step(wrapped, optimizer, seed=2)
    names = {parameter: name for name, parameter in model.named_parameters()}
    before = {names[p]: copy.deepcopy(dict(state)) for p, state in optimizer.state.items()}
    kept = choose_kept(bases(family), heads=[3, 2], channels=[20, 31])
    apply_cut_to_optimizer(optimizer, apply_cut(model, specs, as_tensors(kept)))

    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [
        id(p) for p in list_trainable(wrapped)
    ]
    assert {id(p) for p in optimizer.state} == {id(p) for p in list_trainable(wrapped)}
    for spec in specs:
        for piece in spec.slices:
            linear = model.get_submodule(piece.module)
            positions = list_positions(kept[spec.name], piece.block)
            for factor, parameter in (
                ("lora_A", linear.lora_A["default"].weight),
                ("lora_B", linear.lora_B["default"].weight),
            ):
                state = optimizer.state[parameter]
                old = before[f"{piece.module}.{factor}.default.weight"]
                assert (
                    state.keys()
                    == old.keys()
                    == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
                )
                assert state["step"] == 2
                for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
                    assert state[key].shape == parameter.shape
                    cut = factor == ("lora_B" if piece.dim == 0 else "lora_A")
                    for small, full in enumerate(positions if cut else range(parameter.shape[0])):
                        if cut and piece.dim == 1:
                            assert torch.equal(state[key][:, small], old[key][:, full])
                        else:
                            assert torch.equal(state[key][small], old[key][full])


@some_families
def test_training_goes_on_as_if_masked(bases, family):
    kept = choose_kept(bases(family), heads=[3, 2], channels=[20, 31])
    wrapped, model, specs = build_lora(bases(family))
    masked, masked_model, _ = build_lora(bases(family))
    # Momentum is linear in the gradient, so rounding stays rounding; Adam would divide it by
    # second moments near zero.
    options = {"lr": 1e-3, "momentum": 0.9}
    optimizer = torch.optim.SGD(list_trainable(wrapped), **options)
    reference = torch.optim.SGD(list_trainable(masked), **options)
    for seed in (1, 2):
        step(wrapped, optimizer, seed=seed)
        step(masked, reference, seed=seed)
    apply_cut_to_optimizer(optimizer, apply_cut(model, specs, as_tensors(kept)))
    apply_masks(masked_model, specs, as_masks(specs, kept))
    for seed in (3, 4, 5):
        step(wrapped, optimizer, seed=seed)
        step(masked, reference, seed=seed)
    for small, full in pair_factors(wrapped, masked, specs, kept, lambda p: p.detach()):
        torch.testing.assert_close(small, full, **CLOSE)
    torch.testing.assert_close(compute_logits(wrapped), compute_logits(masked), **CLOSE)


def test_an_optimizer_without_state_takes_the_new_parameters(bases):
    wrapped, model, specs = build_lora(bases("llama-gqa"))
    trainable = list_trainable(wrapped)
    groups = [{"params": trainable[::2], "lr": 1e-3}, {"params": trainable[1::2], "lr": 1e-2}]
    optimizer = torch.optim.AdamW(groups)
    kept = choose_kept(bases("llama-gqa"), heads=3, channels=20)
    replaced = apply_cut(model, specs, as_tensors(kept))
    assert len(replaced) == 14
    apply_cut_to_optimizer(optimizer, replaced)
    assert not optimizer.state
    now = list_trainable(wrapped)
    for group, expected in zip(optimizer.param_groups, (now[::2], now[1::2]), strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in expected]
    untouched = {id(p) for p in trainable} & {id(p) for p in now}
    assert len(untouched) == 14  # of each projection one factor stays as it is
