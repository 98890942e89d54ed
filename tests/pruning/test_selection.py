import pytest
import torch

from lpdeploy.plan import GroupSpec
from lpdeploy.pruning.selection import select_globally, select_per_layer
from tests import reference

MULTIPLES = {"heads": 1, "channels": 4}


def both(ratio):
    return {"heads": ratio, "channels": ratio}


def make_specs(layers=3, heads=8, channels=32):
    return [
        GroupSpec(f"layers.{layer}.{kind}", count, ())
        for layer in range(layers)
        for kind, count in (("heads", heads), ("channels", channels))
    ]


def random_importance(specs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {spec.name: torch.rand(spec.num_groups, generator=generator) for spec in specs}


@pytest.mark.parametrize("ratio", [0.0, 0.2, 0.5, 0.9])
def test_per_layer_selection_matches_the_loop(ratio):
    specs = make_specs()
    importance = random_importance(specs)
    kept = select_per_layer(importance, specs, ratios=both(ratio), multiples=MULTIPLES)
    for spec in specs:
        keep = reference.kept_count(spec.num_groups, ratio, MULTIPLES[spec.kind])
        assert kept[spec.name].tolist() == reference.select(importance[spec.name].tolist(), keep)


@pytest.mark.parametrize(("ratio", "each"), [(0.0, 4), (0.25, 3), (0.5, 2), (0.6, 2), (0.95, 1)])
def test_every_cluster_keeps_as_many(ratio, each):
    """Twelve query heads on three KV heads, against a loop over the KV heads."""
    specs = [GroupSpec("layers.0.heads", 12, (), clusters=3)]
    scores = random_importance(specs)["layers.0.heads"]
    kept = select_per_layer(
        {"layers.0.heads": scores}, specs, ratios=both(ratio), multiples=MULTIPLES
    )
    expected = []
    for first in (0, 4, 8):
        own = range(first, first + 4)
        expected += sorted(sorted(own, key=lambda head: -scores[head].item())[:each])
    assert kept["layers.0.heads"].tolist() == expected


def test_clusters_keep_as_many_where_some_are_gone_already():
    specs = [GroupSpec("layers.0.heads", 12, (), clusters=3)]
    scores = torch.tensor([0.1, 0.9, 0.5, 0.8, 0.7, 0.6])  # two of four are left of each
    kept = select_per_layer(
        {"layers.0.heads": scores}, specs, ratios=both(0.75), multiples=MULTIPLES
    )
    assert kept["layers.0.heads"].tolist() == [1, 3, 4]


def test_equal_scores_keep_the_earlier_groups():
    specs = [GroupSpec("layers.0.heads", 6, ())]
    importance = {"layers.0.heads": torch.zeros(6)}
    kept = select_per_layer(importance, specs, ratios=both(0.5), multiples=MULTIPLES)
    assert kept["layers.0.heads"].tolist() == [0, 1, 2]


def test_what_is_gone_never_comes_back():
    specs = [GroupSpec("layers.0.heads", 8, ())]
    importance = {"layers.0.heads": torch.rand(3)}  # five of eight are gone already
    kept = select_per_layer(importance, specs, ratios=both(0.5), multiples=MULTIPLES)
    assert kept["layers.0.heads"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("ratio", [0.0, 0.2, 0.5, 0.9])
def test_global_selection_keeps_its_promises(ratio):
    specs = make_specs(layers=5, channels=30)  # 30 is no multiple of 4
    importance = random_importance(specs)
    kept = select_globally(importance, specs, ratios=both(ratio), multiples=MULTIPLES)
    for kind, multiple in MULTIPLES.items():
        family = [spec for spec in specs if spec.kind == kind]
        counts = [len(kept[spec.name]) for spec in family]
        total = sum(spec.num_groups for spec in family)
        assert abs(sum(counts) - (1 - ratio) * total) <= 1.5 * multiple
        assert all(count >= min(multiple, 1) for count in counts)
        assert all(count % multiple == 0 or count == 30 for count in counts)


def test_global_selection_takes_from_the_least_important_layer():
    specs = make_specs(layers=2)
    importance = random_importance(specs)
    importance["layers.1.heads"] += 10
    kept = select_globally(importance, specs, ratios=both(0.4), multiples=MULTIPLES)
    assert len(kept["layers.1.heads"]) == 8
    assert len(kept["layers.0.heads"]) == 2
    best = importance["layers.0.heads"].topk(2).indices.sort().values
    assert kept["layers.0.heads"].tolist() == best.tolist()


def test_global_selection_leaves_a_chunk_in_every_layer():
    specs = make_specs(layers=2)
    importance = random_importance(specs)
    importance["layers.1.channels"] += 10
    kept = select_globally(importance, specs, ratios=both(0.9), multiples=MULTIPLES)
    assert len(kept["layers.0.channels"]) == 4


@pytest.mark.parametrize("select", [select_per_layer, select_globally])
def test_heads_and_channels_have_shares_of_their_own(select):
    specs = make_specs(layers=2)
    ratios = {"heads": 0.25, "channels": 0.75}
    kept = select(random_importance(specs), specs, ratios=ratios, multiples=MULTIPLES)
    totals = {
        kind: sum(len(kept[spec.name]) for spec in specs if spec.kind == kind) for kind in ratios
    }
    assert totals == {"heads": 2 * 6, "channels": 2 * 8}
