"""LoRA through peft: attached, saved, read back, expanded, left unmerged."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lpdeploy.errors import ArtifactError
from lpdeploy.families.groups import LINEARS, list_group_specs
from lpdeploy.models.adapters import (
    LoraWeights,
    apply_lora_weights,
    attach_lora,
    check_adapter,
    expand_lora,
    get_base_linear,
    get_lora_weights,
    init_lora_by_groups,
    load_adapter,
    load_unmerged,
)
from lpdeploy.models.cutting import apply_masks
from lpdeploy.models.loading import load_model
from tests.models.families import (
    FAMILIES,
    build_reference,
    choose_kept,
    compute_logits,
    list_positions,
    make_plan,
    make_run,
)

every_family = pytest.mark.parametrize("family", FAMILIES)
# float32 sums in another order, a few 2**-24 of logits up to 5; a wrong row changes 0.1 and more.
CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture
def run(bases, tmp_path):
    kept = choose_kept(bases("llama-gqa"), heads=[3, 2], channels=[20, 31])
    return make_run(tmp_path / "run", bases("llama-gqa"), kept)


@every_family
def test_lora_is_on_all_seven_projections_and_trains_alone(bases, family):
    model = load_model(bases(family, torch.bfloat16))
    wrapped = attach_lora(model, rank=3, alpha=12, dropout=0.0, seed=1)
    carrying = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    assert sorted({name.rsplit(".", 1)[1] for name in carrying}) == sorted(LINEARS)
    assert len(carrying) == 2 * 7
    trainable = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 2 * 7
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trainable.items())
    for name in carrying:
        linear = model.get_submodule(name)
        weights, base = get_lora_weights(linear), get_base_linear(linear)
        assert base.weight.dtype == torch.bfloat16
        assert weights.lora_a.shape == (3, base.in_features)
        assert weights.lora_b.shape == (base.out_features, 3)
        assert weights.scaling == 4.0


@every_family
def test_lora_that_starts_by_groups_changes_no_output_and_only_the_start_of_o_and_down(
    bases, family
):
    tokens = torch.arange(12).view(2, 6)
    model = load_model(bases(family)).eval()
    with torch.no_grad():
        plain = model(tokens).logits
    wrapped = attach_lora(model, rank=3, alpha=6, dropout=0.0, seed=1, init="groups").eval()
    usual = attach_lora(load_model(bases(family)), rank=3, alpha=6, dropout=0.0, seed=1)
    with torch.no_grad():
        assert torch.equal(wrapped(tokens).logits, plain)
    for name, module in usual.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        started = get_lora_weights(wrapped.get_submodule(name))
        if name.endswith(("o_proj", "down_proj")):
            assert not started.lora_a.any()
            bound = started.lora_b.shape[0] ** -0.5
            assert 0.8 * bound < started.lora_b.abs().max() <= bound
        else:
            assert torch.equal(started.lora_a, get_lora_weights(module).lora_a)
            assert not started.lora_b.any()


def test_the_seed_decides_the_start_by_groups(bases):
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_B.default.weight"
    first, second, other = (
        attach_lora(
            load_model(bases("llama-gqa")), rank=4, alpha=8, dropout=0.0, seed=seed, init="groups"
        ).state_dict()[name]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (None, "no LoRA adapter 'default' on o_proj and down_proj"),
        ({"adapter_name": "mine"}, "no LoRA adapter 'default'"),
        ({"target_modules": ["q_proj"]}, "no LoRA adapter 'default'"),
        ({"init_lora_weights": "pissa"}, "B is not 0"),
    ],
)
def test_only_a_new_adapter_is_started_by_groups(bases, options, sentence):
    model = load_model(bases("llama-gqa"))
    if options is not None:
        name = {"adapter_name": options.pop("adapter_name", "default")}
        model = get_peft_model(
            model, LoraConfig(**{"target_modules": list(LINEARS), **options}), **name
        )
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(ValueError, match=sentence):
        init_lora_by_groups(model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_the_seed_decides_the_start(bases):
    first, second, other = (
        attach_lora(load_model(bases("llama-gqa")), rank=4, alpha=8, dropout=0.0, seed=seed)
        for seed in (1, 1, 2)
    )
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_A.default.weight"
    assert torch.equal(first.state_dict()[name], second.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


def test_a_linear_without_lora_is_its_own_base(bases):
    linear = load_model(bases("llama-gqa")).model.layers[0].mlp.up_proj
    assert get_base_linear(linear) is linear


def test_a_saved_adapter_is_read_back(bases, tmp_path):
    model = load_model(bases("llama-bias"))
    wrapped = attach_lora(model, rank=4, alpha=6, dropout=0.1, seed=1)
    wrapped.save_pretrained(str(tmp_path), save_embedding_layers=False)
    weights = load_adapter(tmp_path)
    assert len(weights) == 14
    for name, read in weights.items():
        live = get_lora_weights(model.get_submodule(name))
        assert torch.equal(read.lora_a, live.lora_a)
        assert torch.equal(read.lora_b, live.lora_b)
        assert read.scaling == live.scaling == 1.5


def test_a_saved_adapter_names_its_modules_in_the_same_order_every_time(bases, tmp_path):
    # A set of words has another order in every process, and the files another hash.
    model = load_model(bases("llama-mha"))
    attach_lora(model, rank=2, alpha=4, dropout=0.0, seed=0).save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(LINEARS)


def test_applied_weights_are_copied(bases, tmp_path):
    wrapped = attach_lora(load_model(bases("llama-gqa")), rank=4, alpha=8, dropout=0.0, seed=9)
    generator = torch.Generator().manual_seed(4)
    weights = {
        "model.layers.1.mlp.up_proj": LoraWeights(
            torch.randn(4, 32, generator=generator), torch.randn(48, 4, generator=generator), 2.0
        )
    }
    before = {name: p.clone() for name, p in wrapped.named_parameters()}
    apply_lora_weights(wrapped.get_base_model(), weights)
    changed = {n for n, p in wrapped.named_parameters() if not torch.equal(p, before[n])}
    prefix = "base_model.model.model.layers.1.mlp.up_proj"
    assert changed == {f"{prefix}.lora_A.default.weight", f"{prefix}.lora_B.default.weight"}
    live = get_lora_weights(wrapped.get_base_model().get_submodule("model.layers.1.mlp.up_proj"))
    assert torch.equal(live.lora_b, weights["model.layers.1.mlp.up_proj"].lora_b)


@every_family
def test_an_expanded_adapter_has_zeros_where_groups_went(bases, family, tmp_path):
    kept = choose_kept(bases(family), heads=[3, 2], channels=[20, 31])
    small = load_adapter(make_run(tmp_path / "run", bases(family), kept) / "adapter")
    plan = make_plan(bases(family), kept)
    full = expand_lora(small, plan)
    assert full.keys() == small.keys()
    model = load_model(bases(family))
    for spec in plan.specs:
        for piece in spec.slices:
            weight = model.get_submodule(piece.module).weight
            lora, source = full[piece.module], small[piece.module]
            assert (lora.lora_b.shape[0], lora.lora_a.shape[1]) == weight.shape
            assert lora.scaling == source.scaling
            positions = list_positions(kept[spec.name], piece.block)
            expanded, factor = lora.lora_b, source.lora_b
            if piece.dim == 1:
                expanded, factor = lora.lora_a.T, source.lora_a.T
                assert torch.equal(lora.lora_b, source.lora_b)
            else:
                assert torch.equal(lora.lora_a, source.lora_a)
            for row in range(len(expanded)):
                if row in positions:
                    assert torch.equal(expanded[row], factor[positions.index(row)])
                else:
                    assert not expanded[row].any()


@every_family
def test_the_masked_base_with_the_expanded_adapter_is_the_reference(bases, family, tmp_path):
    """What `verify` compares with computes what the plain loops of the reference compute."""
    kept = choose_kept(bases(family), heads=[3, 2], channels=[20, 31])
    run = make_run(tmp_path / "run", bases(family), kept)
    plan = make_plan(bases(family), kept)
    model = load_model(bases(family))
    wrapped = attach_lora(model, rank=4, alpha=8, dropout=0.0, seed=0).eval()
    apply_lora_weights(model, expand_lora(load_adapter(run / "adapter"), plan))
    masks = {
        spec.name: torch.tensor([g in kept[spec.name] for g in range(spec.num_groups)])
        for spec in plan.specs
    }
    apply_masks(model, plan.specs, masks)
    reference = build_reference(bases(family), kept, run / "adapter")
    torch.testing.assert_close(compute_logits(wrapped), compute_logits(reference), **CLOSE)


def test_an_unmerged_model_computes_with_its_adapter(bases, tmp_path):
    model = load_model(bases("llama-gqa"))
    plain = compute_logits(model)
    everything = {s.name: list(range(s.num_groups)) for s in list_group_specs(model.config)}
    run = make_run(tmp_path / "run", bases("llama-gqa"), everything)
    unmerged = load_unmerged(model, run / "adapter")
    assert not unmerged.training
    reference = build_reference(bases("llama-gqa"), everything, run / "adapter")
    torch.testing.assert_close(compute_logits(unmerged), compute_logits(reference), **CLOSE)
    assert (compute_logits(unmerged) - plain).abs().max() > 0.1


def test_a_missing_adapter_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    """'run/adapter' is also a valid name on the hub."""

    def refuse(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("peft.config.hf_hub_download", refuse)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match=r"No adapter_config.json in '.*adapter'. Prune again"):
        load_adapter(type(tmp_path)("run/adapter"))


def test_a_broken_adapter_is_refused(run):
    adapter = run / "adapter"
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-50])
    with pytest.raises(ArtifactError, match=r"is no readable LoRA adapter: .*Prune again"):
        load_adapter(adapter)
    weights.unlink()
    with pytest.raises(ArtifactError, match=r"is no readable LoRA adapter: .*Prune again"):
        load_adapter(adapter)
    weights.write_bytes(whole)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(
        ArtifactError, match=r"adapter_config.json' is not valid JSON .*Prune again"
    ):
        load_adapter(adapter)


def test_an_adapter_must_fit_the_plan(bases, run):
    weights = load_adapter(run / "adapter")
    kept = choose_kept(bases("llama-gqa"), heads=[3, 2], channels=[20, 31])
    check_adapter(weights, make_plan(bases("llama-gqa"), kept))
    fewer = choose_kept(bases("llama-gqa"), heads=[3, 2], channels=[20, 30])
    with pytest.raises(ArtifactError, match=r"leaves 30 rows of .*gate_proj.* has 31. Prune again"):
        check_adapter(weights, make_plan(bases("llama-gqa"), fewer))
    kept["layers.0.heads"] = [0]
    columns = {n: w for n, w in weights.items() if not n.endswith(("q_proj", "k_proj", "v_proj"))}
    plan = make_plan(bases("llama-gqa"), kept)
    with pytest.raises(ArtifactError, match="only one of them has .*layers.0.self_attn.k_proj"):
        check_adapter(columns, plan)
    same = {n: weights[n] for n in weights if ".layers.0.self_attn." not in n}
    with pytest.raises(ArtifactError, match="only one of them has .*layers.0.self_attn.k_proj"):
        check_adapter(same, plan)
