"""The search for a pair of counts: against trying all pairs, with a latency of our own making."""

import itertools

import pytest
import torch

from lpdeploy.benchmark.pairs import compute_losses, find_pair
from lpdeploy.plan import GroupSpec


def make_losses(heads, channels, *, seed):
    """Losses that fall with each count, as sums of random scores in both directions do."""
    generator = torch.Generator().manual_seed(seed)
    sides = [
        torch.rand(size, generator=generator, dtype=torch.float64).pow(-1).sort().values
        for size in (heads - 1, channels - 1)
    ]
    lost = [torch.cat([side.flip(0).cumsum(0).flip(0), torch.zeros(1)]) for side in sides]
    return lost[0].unsqueeze(1) + lost[1].unsqueeze(0)


def make_latency(seed, *, share):
    """A latency that rises with both counts, and a target that so much of its range meets."""
    weights = torch.rand(2, generator=torch.Generator().manual_seed(100 + seed)) + 0.2

    def measure(heads, channels, shape):
        places = torch.tensor([heads / (shape[0] - 1), channels / (shape[1] - 1)])
        return float((weights * places.sqrt()).sum())

    return measure, share * float(weights.sum())


def search(losses, *, seed, share, budget):
    latency, target = make_latency(seed, share=share)
    asked = []

    def is_quick(heads, channels):
        asked.append((heads, channels))
        return latency(heads, channels, losses.shape) <= target

    found = find_pair(losses, is_quick, budget=budget)
    quick = [
        pair
        for pair in itertools.product(*map(range, losses.shape))
        if latency(*pair, losses.shape) <= target
    ]
    return found, asked, min(quick, key=lambda pair: losses[pair].item())


def test_as_many_go_of_each_cluster():
    """By an independent loop over layers and clusters."""
    specs = [
        GroupSpec(f"layers.{layer}.{kind}", count, (), clusters=clusters)
        for layer in range(2)
        for kind, count, clusters in (("heads", 6, 2), ("channels", 5, 1))
    ]
    generator = torch.Generator().manual_seed(3)
    importance = {spec.name: torch.rand(spec.num_groups, generator=generator) for spec in specs}
    losses = compute_losses(importance, specs, heads=[2, 4, 6], channels=[1, 5])

    def lose(spec, kept):
        size = spec.num_groups // spec.clusters
        parts = importance[spec.name].tolist()
        clusters = [sorted(parts[at : at + size]) for at in range(0, spec.num_groups, size)]
        gone = (spec.num_groups - kept) // spec.clusters
        return sum(sum(cluster[:gone]) for cluster in clusters)

    for row, heads in enumerate([2, 4, 6]):
        for column, channels in enumerate([1, 5]):
            kept = {"heads": heads, "channels": channels}
            expected = sum(lose(spec, kept[spec.kind]) for spec in specs)
            assert losses[row, column].item() == pytest.approx(expected)


def test_it_finds_what_trying_all_pairs_finds():
    shapes, shares = ((2, 2), (4, 22), (8, 43)), (0.3, 0.6, 0.9)
    for shape, share, seed in itertools.product(shapes, shares, range(5)):
        case = f"shape {shape}, share {share}, seed {seed}"
        losses = make_losses(*shape, seed=seed)
        found, asked, best = search(losses, seed=seed, share=share, budget=1000)
        assert (found.heads, found.channels) == best, case
        assert found.loss == found.bound == losses[best].item(), case
        assert len(asked) == len(set(asked)) <= 26, case
        assert (shape[0] - 1, shape[1] - 1) not in asked, case  # which are known before
        assert (0, 0) not in asked, case


def test_one_head_leaves_channels_to_choose():
    losses = make_losses(2, 30, seed=0)[1:]
    found = find_pair(losses, lambda _, channels: channels <= 17, budget=1000)
    assert (found.heads, found.channels) == (0, 17)


@pytest.mark.parametrize("seed", range(5))
def test_a_search_that_is_cut_short_knows_how_good_its_pair_may_be(seed):
    losses = make_losses(32, 344, seed=seed)
    found, asked, best = search(losses, seed=seed, share=0.5, budget=8)
    assert len(asked) == 8
    assert found.bound <= losses[best].item() <= found.loss
    assert (found.heads, found.channels) in [*asked, (0, 0)]


def test_expected_losses_are_the_sums_of_the_lowest_scores():
    generator = torch.Generator().manual_seed(0)
    specs = [
        GroupSpec(f"layers.{layer}.{kind}", count, ())
        for layer in range(3)
        for kind, count in (("heads", 4), ("channels", 10))
    ]
    scores = {spec.name: torch.rand(spec.num_groups, generator=generator) for spec in specs}
    heads, channels = [1, 2, 4], [2, 4, 10]
    losses = compute_losses(scores, specs, heads=heads, channels=channels)
    for (row, kept_heads), (column, kept_channels) in itertools.product(
        enumerate(heads), enumerate(channels)
    ):
        kept = {"heads": kept_heads, "channels": kept_channels}
        expected = sum(
            sum(sorted(scores[spec.name].tolist())[: spec.num_groups - kept[spec.kind]])
            for spec in specs
        )
        assert losses[row, column].item() == pytest.approx(expected)
