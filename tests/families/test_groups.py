"""What belongs to a group, against the modules of real models."""

import pytest
import torch
from torch import nn

from lpdeploy.families.groups import (
    count_group_parameters,
    expand_index,
    get_head_dim,
    has_bias,
    list_group_specs,
)
from lpdeploy.models.cutting import apply_cut
from lpdeploy.models.loading import load_config, load_model
from lpdeploy.models.shapes import count_parameters
from tests.models.families import FAMILIES, list_positions

every_family = pytest.mark.parametrize("family", FAMILIES)


def list_projections(model):
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("model.layers.")
    }


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@every_family
def test_every_projection_is_owned_once(bases, family):
    model = load_model(bases(family))
    specs = list_group_specs(model.config)
    owned = [piece.module for spec in specs for piece in spec.slices]
    assert sorted(owned) == sorted(list_projections(model))
    assert [spec.name for spec in specs] == [
        "layers.0.heads", "layers.0.channels", "layers.1.heads", "layers.1.channels",
    ]  # fmt: skip


@every_family
def test_groups_fill_the_rows_and_columns_of_the_weights(bases, family):
    model = load_model(bases(family))
    for spec in list_group_specs(model.config):
        for piece in spec.slices:
            weight = model.get_submodule(piece.module).weight
            assert weight.shape[piece.dim] == spec.num_groups * piece.block
            assert weight.shape[1 - piece.dim] == model.config.hidden_size


@every_family
def test_a_head_group_is_a_kv_head_with_its_query_heads(bases, family):
    model = load_model(bases(family))
    attention = model.model.layers[1].self_attn
    heads = list_group_specs(model.config)[2]
    blocks = {piece.module.rsplit(".", 1)[1]: (piece.dim, piece.block) for piece in heads.slices}
    n_rep = attention.num_key_value_groups  # transformers' own word for it
    assert heads.num_groups == model.config.num_key_value_heads
    assert blocks == {
        "q_proj": (0, n_rep * attention.head_dim),
        "k_proj": (0, attention.head_dim),
        "v_proj": (0, attention.head_dim),
        "o_proj": (1, n_rep * attention.head_dim),
    }
    assert get_head_dim(model.config) == attention.head_dim


@every_family
def test_a_query_head_owns_nothing_of_its_kv_head(bases, family):
    model = load_model(bases(family))
    attention, config = model.model.layers[1].self_attn, model.config
    if attention.num_key_value_groups == 1:
        pytest.skip("each KV head has one query head")
    heads = list_group_specs(config, heads="query-heads")[2]
    assert (heads.num_groups, heads.clusters) == (
        config.num_attention_heads,
        config.num_key_value_heads,
    )
    owned = {piece.module.rsplit(".", 1)[1]: (piece.dim, piece.block) for piece in heads.slices}
    assert owned == {"q_proj": (0, attention.head_dim), "o_proj": (1, attention.head_dim)}
    assert heads.whole == tuple(f"model.layers.1.self_attn.{name}_proj" for name in "kv")
    before = count(model)
    apply_cut(model, [heads], {heads.name: torch.arange(0, heads.num_groups, 2)})
    removed = heads.num_groups // 2
    assert before - count(model) == removed * count_group_parameters(heads, config)
    assert attention.num_key_value_groups == removed // config.num_key_value_heads


@every_family
def test_biases_are_where_the_model_has_them(bases, family):
    model = load_model(bases(family))
    for name, linear in list_projections(model).items():
        assert has_bias(model.config, name) == (linear.bias is not None), name


@every_family
def test_per_head_norms_have_one_weight_for_all_heads(bases, family):
    model = load_model(bases(family))
    norms = [m for n, m in model.named_modules() if n.endswith(("q_norm", "k_norm"))]
    assert len(norms) == (4 if family == "qwen3" else 0)
    for norm in norms:
        assert norm.weight.shape == (get_head_dim(model.config),)


@every_family
def test_a_group_counts_what_its_removal_removes(bases, family):
    model = load_model(bases(family))
    for spec in list_group_specs(model.config):
        before = count(model)
        apply_cut(model, [spec], {spec.name: torch.arange(1, spec.num_groups)})
        assert before - count(model) == count_group_parameters(spec, model.config)


@every_family
def test_every_parameter_is_accounted_for(bases, family):
    """Groups, and what no group owns: embeddings, norms, and the biases of whole outputs."""
    model = load_model(bases(family))
    config = model.config
    groups = sum(
        spec.num_groups * count_group_parameters(spec, config) for spec in list_group_specs(config)
    )
    rest = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if "proj" not in name or name.endswith(("o_proj.bias", "down_proj.bias"))
    )
    assert groups + rest == count(model) == count_parameters(load_config(bases(family)))


@pytest.mark.parametrize("block", [1, 3, 8])
@pytest.mark.parametrize("kept", [[0], [1, 4, 5], []])
def test_expand_index_lists_the_positions_of_each_group(kept, block):
    index = expand_index(torch.tensor(kept, dtype=torch.int64), block)
    assert index.tolist() == list_positions(kept, block)
    assert index.dtype == torch.int64
