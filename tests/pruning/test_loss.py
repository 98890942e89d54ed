"""The loss by chunks of tokens, against transformers' own."""

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from lpdeploy.pruning import loss as module
from lpdeploy.pruning.loss import Taught, compute_loss, count_chunk_tokens


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


def make_teacher(head, *, kept, temperature, weight):
    """Draw a teacher's logits, and keep what a cache would of them."""
    generator = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(3, 11, len(head), generator=generator)
    return logits, keep_top(logits, kept=kept, temperature=temperature, weight=weight)


def keep_top(logits, *, kept, temperature=1.0, weight=1.0):
    logs = (logits / temperature).log_softmax(-1)
    top = logs.topk(kept, dim=-1)
    others = logs.scatter(-1, top.indices, -torch.inf).logsumexp(-1, keepdim=True)
    log_probs = torch.cat([top.values, others], dim=-1).clamp_min(-60_000)
    return Taught(log_probs, top.indices, weight=weight, temperature=temperature)


def compute_distilled(hidden, head, labels, logits, taught, *, targets):
    """The definition, over all logits, with torch's own divergence."""
    own, logits = (hidden @ head.t()).double(), logits.double()
    following = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    entropy = torch.nn.functional.cross_entropy(
        own.flatten(0, 1), following.flatten(), ignore_index=-100, reduction="none"
    )

    def bucket(all_logits):
        logs = (all_logits / taught.temperature).log_softmax(-1)
        others = logs.scatter(-1, taught.ids, -torch.inf).logsumexp(-1, keepdim=True)
        return torch.cat([logs.gather(-1, taught.ids), others], dim=-1)

    divergence = torch.nn.functional.kl_div(
        bucket(own), bucket(logits), reduction="none", log_target=True
    ).sum(-1)
    mixed = (1 - taught.weight) * entropy
    mixed = mixed + taught.weight * taught.temperature**2 * divergence.flatten()
    return ((mixed * (following.flatten() != -100)).sum() / targets).float()


@pytest.mark.parametrize("chunk", [1, 5, 1000])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("weight", [0.5, 1.0])
@pytest.mark.parametrize("kept", [1, 8, 49])
def test_with_a_teacher_it_is_the_definition(monkeypatch, chunk, temperature, weight, kept):
    monkeypatch.setitem(module._CHUNK_BYTES, "cpu", 4 * 50 * chunk)
    hidden, head, labels = make_inputs()
    logits, taught = make_teacher(head, kept=kept, temperature=temperature, weight=weight)
    expected = compute_distilled(hidden, head, labels, logits, taught, targets=23)
    (gradient,) = torch.autograd.grad(expected, hidden)
    loss = compute_loss(hidden, head, labels, targets=23, taught=taught)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], gradient, rtol=1e-3, atol=1e-5)


def test_a_teacher_that_says_the_same_adds_nothing():
    hidden, head, labels = make_inputs()
    taught = keep_top(hidden.detach() @ head.t(), kept=6)
    loss = compute_loss(hidden, head, labels, targets=1, taught=taught)
    loss.backward()
    assert loss.abs() < 1e-4
    assert hidden.grad.abs().max() < 1e-4


def test_a_teacher_that_keeps_the_whole_vocabulary_has_no_rest():
    hidden, head, labels = make_inputs()
    logits, taught = make_teacher(head, kept=50, temperature=1.0, weight=1.0)
    loss = compute_loss(hidden, head, labels, targets=1, taught=taught)
    following = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    expected = torch.nn.functional.kl_div(
        (hidden @ head.t()).log_softmax(-1), logits.softmax(-1), reduction="none"
    ).sum(-1)
    torch.testing.assert_close(loss, (expected * (following != -100)).sum(), rtol=1e-4, atol=1e-3)
