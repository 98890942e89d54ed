"""The loss by chunks of tokens, against transformers' own."""

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from lpdeploy.pruning import loss as module
from lpdeploy.pruning.loss import compute_loss, count_chunk_tokens


def make_inputs(*, dtype=torch.float32, vocab=50):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 11, 16, generator=generator).to(dtype).requires_grad_()
    head = torch.randn(vocab, 16, generator=generator).to(dtype)
    labels = torch.randint(vocab, (3, 11), generator=generator)
    labels[0, :4] = -100  # a prompt
    labels[1, 7:] = -100  # padding
    return hidden, head, labels


def compute_reference(hidden, head, labels, *, targets):
    return ForCausalLMLoss(
        hidden @ head.t(), labels, len(head), num_items_in_batch=torch.tensor(targets)
    )


@pytest.mark.parametrize("chunk", [1, 5, 33, 1000])
def test_it_is_the_loss_of_transformers(chunk, monkeypatch):
    monkeypatch.setitem(module._CHUNK_BYTES, "cpu", 4 * 50 * chunk)
    hidden, head, labels = make_inputs()
    expected = compute_reference(hidden, head, labels, targets=23)
    (gradient,) = torch.autograd.grad(3 * expected, hidden)
    loss = compute_loss(hidden, head, labels, targets=23)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(3 * loss, hidden)[0], gradient)
    assert gradient[0, 10].abs().max() == 0  # the last token predicts nothing
    assert gradient[0, 3].abs().max() > 0  # the last of the prompt predicts the first that counts


def test_half_precision_is_as_near_as_that_of_transformers():
    exact = compute_reference(*make_inputs(), targets=9)
    hidden, head, labels = make_inputs(dtype=torch.bfloat16)
    reference = compute_reference(hidden, head, labels, targets=9)
    loss = compute_loss(hidden, head, labels, targets=9)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, reference)
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)
    expected, gradient = (torch.autograd.grad(one, hidden)[0] for one in (reference, loss))
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient, expected, rtol=0.02, atol=0.02)


def test_large_logits_stay_finite():
    hidden, head, labels = make_inputs()
    loss = compute_loss(hidden * 1e4, head, labels, targets=1)
    torch.testing.assert_close(loss, compute_reference(hidden * 1e4, head, labels, targets=1))


def test_without_a_gradient_none_is_made():
    hidden, head, labels = make_inputs()
    with torch.no_grad():
        loss = compute_loss(hidden, head, labels, targets=1)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, compute_reference(hidden, head, labels, targets=1).detach())


def test_rows_without_a_target_cost_nothing():
    hidden, head, labels = make_inputs()
    loss = compute_loss(hidden, head, torch.full_like(labels, -100), targets=1)
    loss.backward()
    assert loss == 0
    assert hidden.grad.abs().max() == 0


def test_a_chunk_has_a_token_however_large_the_vocabulary():
    assert count_chunk_tokens(1 << 40, "cpu") == 1
    assert count_chunk_tokens(32_000, "cpu") == 262
