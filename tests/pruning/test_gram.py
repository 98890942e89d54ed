"""Gram matrices that are summed up by blocks, against the plain product in float64."""

import pytest
import torch

from lpdeploy.pruning.gram import add_gram


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("columns", [1, 255, 256, 257, 700])
def test_it_adds_the_whole_product(columns, autocast):
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(tokens, columns, generator=generator) for tokens in (40, 7))
    gram = torch.zeros(columns, columns)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        add_gram(gram, first)
        add_gram(gram, second)
    rows = torch.cat([first, second]).double()
    # Sums of 47 products in float32.
    torch.testing.assert_close(gram.double(), rows.T @ rows, rtol=1e-5, atol=1e-4)
    assert torch.equal(gram, gram.T)
