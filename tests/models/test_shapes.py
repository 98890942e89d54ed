"""Widths of a pruned model, the config that states them, and the counts, against real models."""

import itertools

import pytest
import torch
from transformers import AutoConfig

from lpdeploy.config import PruneConfig
from lpdeploy.errors import LpdeployError
from lpdeploy.families.groups import list_group_specs, list_layer_specs
from lpdeploy.models.cutting import apply_cut
from lpdeploy.models.loading import get_model_classes, load_config, load_model
from lpdeploy.models.shapes import (
    LayerWidths,
    build_counter,
    build_pruned_config,
    compute_achieved,
    compute_ratios,
    compute_widths,
    count_kept,
    count_parameters,
    forecast_config,
    forecast_widths,
    list_counts,
    list_prunable,
    list_widths,
    round_kept,
)
from lpdeploy.plan import GroupSpec
from tests import reference
from tests.models.families import FAMILIES, choose_kept, keep_all, make_base

every_family = pytest.mark.parametrize("family", FAMILIES)


def build(bases, family, **counts):
    config = load_config(bases(family))
    specs = list_group_specs(config)
    widths = compute_widths(config, specs, choose_kept(bases(family), **counts))
    return config, widths, build_pruned_config(config, widths)


@every_family
def test_widths_are_those_of_the_cut_model(bases, family):
    model = load_model(bases(family))
    specs = list_group_specs(model.config)
    kept = choose_kept(bases(family), heads=[3, 2], channels=[20, 31])
    apply_cut(model, specs, {name: torch.tensor(stay) for name, stay in kept.items()})
    widths = compute_widths(model.config, specs, kept)
    for layer, width in zip(model.model.layers, widths, strict=True):
        head_dim = layer.self_attn.head_dim
        assert layer.self_attn.q_proj.out_features == width.heads * head_dim
        assert layer.self_attn.k_proj.out_features == width.kv_heads * head_dim
        assert layer.mlp.down_proj.in_features == width.channels


@every_family
def test_the_widths_of_a_whole_model_are_those_of_its_config(bases, family):
    config = load_config(bases(family))
    expected = [LayerWidths(config.num_attention_heads, config.num_key_value_heads, 48)] * 2
    assert list_widths(config) == expected
    assert compute_widths(config, list_group_specs(config), keep_all(bases(family))) == expected


def test_widths_of_a_per_layer_config_are_read_from_it(bases):
    _, widths, pruned = build(bases, "llama-gqa", heads=[3, 1], channels=[20, 31])
    assert pruned.layer_widths == [[3, 20], [1, 31]]
    assert list_widths(pruned) == widths == [LayerWidths(6, 3, 20), LayerWidths(2, 1, 31)]


@pytest.mark.parametrize(
    ("family", "heads", "expected"),
    [
        ("llama-mha", 2, "LlamaForCausalLM"),
        ("llama-mha", 3, "MistralForCausalLM"),  # 32 does not divide by 3 heads
        ("llama-mha", 4, "LlamaForCausalLM"),
        ("llama-gqa", 2, "LlamaForCausalLM"),
        ("llama-gqa", 3, "MistralForCausalLM"),  # 32 does not divide by 6 heads
        ("llama-bias", 2, "LlamaForCausalLM"),
        ("llama-bias", 3, "PerLayerLlamaForCausalLM"),  # Mistral has no biases
        ("mistral", 3, "MistralForCausalLM"),
        ("qwen2", 3, "Qwen2ForCausalLM"),
        ("qwen3", 3, "Qwen3ForCausalLM"),
        ("llama-gqa", [3, 2], "PerLayerLlamaForCausalLM"),
        ("mistral", [3, 2], "PerLayerMistralForCausalLM"),
        ("qwen2", [3, 2], "PerLayerQwen2ForCausalLM"),
        ("qwen3", [3, 2], "PerLayerQwen3ForCausalLM"),
    ],
)
def test_the_class_is_stock_wherever_one_fits(bases, family, heads, expected):
    config, _, pruned = build(bases, family, heads=heads, channels=20)
    assert pruned.architectures == [expected]
    assert pruned.head_dim == (4 if family == "qwen2" else 8)
    # A LLaMA looks at all tokens: None, not the 4096 that a MistralConfig starts from.
    assert getattr(pruned, "sliding_window", None) == getattr(config, "sliding_window", None)


@every_family
@pytest.mark.parametrize("heads", [2, 3, [3, 2]])
def test_the_config_keeps_all_but_the_widths(bases, family, heads, tmp_path):
    """Written and read back, a pruned config states every value of its base."""
    config, _, pruned = build(bases, family, heads=heads, channels=20)
    pruned.save_pretrained(tmp_path)
    read = load_config(tmp_path).to_dict()
    changed = {name for name, value in config.to_dict().items() if read.get(name, "gone") != value}
    widths = {"num_attention_heads", "num_key_value_heads", "intermediate_size"}
    about = {"architectures", "model_type", "transformers_version", "head_dim", "auto_map"}
    only_llama = {"attention_bias", "mlp_bias", "pretraining_tp"}
    allowed = widths | about | (only_llama if read["model_type"] == "mistral" else set())
    assert changed <= allowed
    assert read["rope_parameters"] == config.to_dict()["rope_parameters"]
    assert read["tie_word_embeddings"] == config.tie_word_embeddings


def test_a_stock_config_needs_no_code_of_ours(bases, tmp_path):
    _, _, pruned = build(bases, "llama-mha", heads=3, channels=20)
    pruned.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config).__name__ == "MistralConfig"
    assert not hasattr(config, "auto_map")
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (3, 3, 8)


def test_a_pruned_config_can_be_pruned_again(bases):
    _, _, pruned = build(bases, "qwen2", heads=3, channels=20)
    assert [spec.num_groups for spec in list_group_specs(pruned)] == [3, 20, 3, 20]
    assert list_group_specs(pruned)[0].slices[0].block == 8  # two query heads of 4


@every_family
@pytest.mark.parametrize("counts", [{"heads": 2, "channels": 20}, {"heads": [3, 2], "channels": 9}])
def test_parameters_are_counted_as_the_real_model_has_them(bases, family, counts):
    _, _, pruned = build(bases, family, **counts)
    _, model_class = get_model_classes(pruned.model_type)
    real = sum(parameter.numel() for parameter in model_class(pruned).parameters())
    assert count_parameters(pruned) == real


def test_counting_allocates_nothing(tmp_path):
    config = load_config(make_base(tmp_path / "base", "llama-gqa"))
    config.vocab_size, config.intermediate_size = 10**9, 10**9  # a terabyte, were it real
    assert count_parameters(config) > 2 * 32 * 10**9


@every_family
def test_the_achieved_share_is_what_the_cut_model_lost(bases, family):
    model = load_model(bases(family))
    specs = list_group_specs(model.config)
    before = sum(parameter.numel() for parameter in model.parameters())
    kept = choose_kept(bases(family), heads=[3, 2], channels=[20, 31])
    achieved = compute_achieved(load_config(bases(family)), specs, kept)
    apply_cut(model, specs, {name: torch.tensor(stay) for name, stay in kept.items()})
    after = sum(parameter.numel() for parameter in model.parameters())
    assert achieved == pytest.approx(
        {
            "groups": (3 + 45) / (8 + 96),
            "heads": 3 / 8,
            "channels": 45 / 96,
            "layers": 0.0,
            "parameters": (before - after) / before,
        },
        rel=1e-12,  # one division in float64
    )


@every_family
def test_nothing_is_achieved_where_all_is_kept(bases, family):
    config = load_config(bases(family))
    achieved = compute_achieved(config, list_group_specs(config), keep_all(bases(family)))
    assert set(achieved.values()) == {0.0}


@pytest.mark.parametrize("total", [1, 4, 8, 26, 172, 704, 11008])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.2, 0.25, 0.5, 0.7, 0.99])
@pytest.mark.parametrize("multiple", [1, 4, 32])
def test_kept_counts_match_the_loop(total, ratio, multiple):
    count = round_kept(total, ratio, multiple=multiple)
    assert count == reference.kept_count(total, ratio, multiple)
    assert 1 <= count <= total


def test_the_counts_that_users_ask_for():
    assert round_kept(8, 0.5, multiple=1) == 4
    assert round_kept(8, 0.2, multiple=1) == 6
    assert round_kept(704, 0.5, multiple=32) == 352
    assert round_kept(11008, 0.2, multiple=32) == 8800
    assert round_kept(172, 0.5, multiple=2) == 86


def test_counts_that_a_layer_may_keep():
    def count(num_groups, *, multiple, clusters=1):
        spec = GroupSpec("layers.0.heads", num_groups, (), clusters=clusters)
        return list_counts(spec, multiples={"heads": multiple})

    assert count(8, multiple=1) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert count(11008, multiple=32) == list(range(32, 11009, 32))
    assert count(172, multiple=32) == [32, 64, 96, 128, 160, 172]
    assert count(4, multiple=8) == [4]
    # As many of each cluster.
    assert count(9, multiple=1, clusters=3) == [3, 6, 9]
    assert count(24, multiple=4, clusters=6) == [12, 24]


@every_family
def test_the_ratios_of_a_count_lead_back_to_it(bases, family):
    config = load_config(bases(family))
    grouped = config.num_attention_heads > config.num_key_value_heads
    for kind in ("kv-groups", "query-heads") if grouped else ("kv-groups",):
        specs = list_layer_specs(config, 0, heads=kind)
        multiples = {"heads": 1, "channels": 5}
        counts = [list_counts(spec, multiples=multiples) for spec in specs]
        for heads, channels in itertools.product(*counts):
            ratios = compute_ratios(specs, [heads, channels])
            request = PruneConfig(
                head_ratio=ratios["heads"], channel_ratio=ratios["channels"], round_to=5, heads=kind
            ).widths
            assert count_kept(config, request) == {"heads": heads, "channels": channels}


@every_family
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.9])
def test_a_forecast_leaves_protected_layers_whole(bases, family, ratio):
    config = load_config(bases(family))
    options = {"ratio": ratio, "round_to": 8}
    whole = list_widths(config)
    kept = forecast_widths(config, PruneConfig(**options).widths)
    heads = reference.kept_count(config.num_key_value_heads, ratio, 1)
    assert {(w.kv_heads, w.channels) for w in kept} == {(heads, reference.kept_count(48, ratio, 8))}
    assert {w.heads * config.num_key_value_heads for w in kept} == {
        heads * config.num_attention_heads
    }
    first = forecast_widths(config, PruneConfig(**options, protect_first=1).widths)
    last = forecast_widths(config, PruneConfig(**options, protect_last=1).widths)
    assert (first, last) == ([whole[0], kept[1]], [kept[0], whole[1]])
    # Scores will make the layers differ, and so does the forecast.
    assert forecast_widths(config, PruneConfig(**options, scope="global").widths) == first


@every_family
@pytest.mark.parametrize("changes", [{}, {"protect_last": 1}, {"round_to": 32}], ids=str)
def test_what_a_ratio_leaves_is_counted_as_the_forecast_has_it(bases, family, changes):
    config = load_config(bases(family))
    options = {"round_to": 4, **changes}
    count = build_counter(config, PruneConfig(target_params=1, **options).widths)
    for ratio in (0, 0.1, 0.3, 0.5, 0.9):
        shape = forecast_config(config, PruneConfig(ratio=ratio, **options).widths)
        assert count(ratio) == count_parameters(shape)


def test_a_model_whose_layers_are_all_protected_cannot_be_pruned(bases):
    config = load_config(bases("llama-gqa"))
    request = PruneConfig(protect_first=1, protect_last=1).widths
    with pytest.raises(LpdeployError, match="`protect_first` 1 and `protect_last` 1 leave none"):
        list_prunable(config, request)
