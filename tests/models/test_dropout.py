"""Dropout whose elements share draws."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lpdeploy.models.dropout import Dropout


@pytest.mark.parametrize("shape", [(400_001,), (7, 333, 129)])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_the_share_is_dropped_and_the_mean_kept(shape, share):
    torch.manual_seed(0)
    out = Dropout(share).train()(torch.ones(shape))
    dropped = (out == 0).double().mean().item()
    spread = (share * (1 - share) / out.numel()) ** 0.5
    assert dropped == pytest.approx(share, abs=5 * spread)
    assert out.double().mean().item() == pytest.approx(1.0, abs=5 * spread / (1 - share))
    assert out.unique().tolist() == pytest.approx([0.0, 1 / (1 - share)], rel=1e-4)


def test_neighbours_are_independent():
    torch.manual_seed(0)
    kept = (Dropout(0.5).train()(torch.ones(1 << 20)) != 0).double() - 0.5
    for distance in (1, 2, 3, 4, 5, 8):
        correlation = 4 * (kept[distance:] * kept[:-distance]).mean().item()
        assert abs(correlation) < 5 / (1 << 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_takes_the_same_elements(dtype):
    hidden = torch.randn(5, 7, dtype=dtype, requires_grad=True)
    out = Dropout(0.3).train()(hidden)
    out.backward(torch.ones_like(out))
    assert out.dtype == hidden.grad.dtype == dtype
    torch.testing.assert_close(hidden.grad * hidden.detach(), out.detach(), rtol=0.02, atol=1e-6)


def test_the_seed_decides():
    layer, hidden = Dropout(0.5).train(), torch.ones(1000)
    torch.manual_seed(3)
    first, second = layer(hidden), layer(hidden)
    torch.manual_seed(3)
    assert layer(hidden).equal(first)
    assert not first.equal(second)


def test_checkpointing_draws_the_same_again():
    layer = Dropout(0.5).train()
    hidden = torch.randn(64, requires_grad=True)
    out = checkpoint(layer, hidden, use_reentrant=False)
    out.sum().backward()
    assert (hidden.grad != 0).equal(out != 0)


def test_nothing_is_dropped_outside_of_training():
    hidden = torch.randn(10)
    assert Dropout(0.5).eval()(hidden).equal(hidden)
    assert Dropout(0.0).train()(hidden).equal(hidden)


def test_everything_may_be_dropped():
    hidden = torch.randn(10, requires_grad=True)
    Dropout(1.0).train()(hidden).sum().backward()
    assert hidden.grad.equal(torch.zeros(10))


def test_it_is_the_dropout_of_pytorch_by_name():
    assert isinstance(Dropout(0.1), nn.Dropout)  # what peft asks of it
