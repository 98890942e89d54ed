"""Mask similarity against plain loops, and random masks against counting all of them."""

import itertools

import pytest
import torch

from lpdeploy.paper.similarity import (
    compute_mask_similarity,
    compute_random_agreement,
    compute_random_jaccard,
)


def compare_by_loops(first, second, removed):
    """The groups of least score go; count what both masks do with each group."""
    gone = [
        {index for _, index in sorted((score, index) for index, score in enumerate(s))[:removed]}
        for s in (first, second)
    ]
    same = sum((g in gone[0]) == (g in gone[1]) for g in range(len(first)))
    return same / len(first), len(gone[0] & gone[1]) / len(gone[0] | gone[1])


@pytest.mark.parametrize(("groups", "ratio", "removed"), [(40, 0.1, 4), (33, 0.5, 16), (9, 0.6, 5)])
def test_it_is_what_loops_count(groups, ratio, removed):
    torch.manual_seed(groups)
    first = torch.rand(groups)
    second = first + torch.rand(groups)
    found = compute_mask_similarity(first, second, ratio=ratio)
    agreement, jaccard = compare_by_loops(first.tolist(), second.tolist(), removed)
    assert 0 < jaccard < 1  # else the case would show nothing
    assert (found["agreement"], found["Jaccard"]) == (agreement, jaccard)


def test_only_the_order_of_the_scores_counts():
    scores = torch.rand(20, generator=torch.Generator().manual_seed(0))
    same = compute_mask_similarity(scores, scores**3 * 1e-6, ratio=0.3)
    assert (same["agreement"], same["Jaccard"]) == (1.0, 1.0)
    opposite = compute_mask_similarity(scores, -scores, ratio=0.5)
    assert (opposite["agreement"], opposite["Jaccard"]) == (0.0, 0.0)


@pytest.mark.parametrize(("groups", "removed"), [(6, 1), (6, 3), (7, 5)])
def test_random_masks_against_all_pairs_of_masks(groups, removed):
    masks = [set(mask) for mask in itertools.combinations(range(groups), removed)]
    pairs = list(itertools.product(masks, masks))
    agreement = sum(groups - len(a ^ b) for a, b in pairs) / groups / len(pairs)
    jaccard = sum(len(a & b) / len(a | b) for a, b in pairs) / len(pairs)
    assert compute_random_agreement(groups, removed) == pytest.approx(agreement, rel=1e-12)
    assert compute_random_jaccard(groups, removed) == pytest.approx(jaccard, rel=1e-9)


def test_random_masks_of_a_wide_layer_are_finite():
    # 11,008 channels of a 7B: the two masks share k/G of what they remove, nearly always.
    assert compute_random_jaccard(11008, 5504) == pytest.approx(1 / 3, rel=1e-3)


def test_a_ratio_that_removes_no_group_has_no_masks():
    assert compute_mask_similarity(torch.rand(4), torch.rand(4), ratio=0.1) == {}


def test_scores_of_other_groups_are_refused():
    with pytest.raises(ValueError, match=r"shapes \(4,\) and \(5,\) are not of the same groups"):
        compute_mask_similarity(torch.rand(4), torch.rand(5), ratio=0.5)
