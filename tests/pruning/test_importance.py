import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lpdeploy.criteria import CRITERIA, ScoredLinear
from lpdeploy.pruning import importance
from lpdeploy.pruning.importance import apply_moving_average, score_linear
from tests import reference

# Both sides are float32 sums of squares in another order; the loops run in float64.
RTOL = 1e-4


def random_layer(out=12, columns=8, rank=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(out, columns), (rank, columns), (out, rank), (rank, columns), (out, rank)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


SCORES = [name for name, criterion in CRITERIA.items() if criterion.score_weights is not None]


def score(weight, a, b, grad_a, grad_b, *, name="lora", scaling=1.0, **how):
    """Score by any criterion; a weight serves as its own gradient, and features are all one."""
    a.grad, b.grad = grad_a, grad_b
    observed = {"gradient": weight, "wanda": torch.ones(weight.shape[1])}.get(name)
    linear = ScoredLinear(a, b, scaling, observed)
    return score_linear(CRITERIA[name], weight, linear, **how)


@pytest.mark.parametrize(("dim", "block"), [(0, 1), (0, 4), (1, 1), (1, 2)])
def test_matches_the_loops_of_the_paper(dim, block):
    tensors = random_layer()
    scores = score(*tensors, scaling=2.0, dim=dim, block=block)
    every = reference.weight_importance(*[t.double().tolist() for t in tensors], 2.0)
    expected = torch.tensor(reference.group_importance(every, dim, block))
    torch.testing.assert_close(scores, expected, rtol=RTOL, atol=0, check_dtype=False)


def backward(weight, a, b, gradient, scaling):
    """Return the gradients of A and B where that of W is ``gradient``."""
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    ((weight + scaling * b @ a) * gradient).sum().backward()
    return a.grad, b.grad


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("init", ["peft", "groups"])
def test_before_the_first_step_scores_tell_groups_apart_where_a_or_b_is_zero(dim, init):
    # Groups 1 and 2 have no gradient. Groups of rows are told apart with B = 0, of columns with
    # A = 0: the estimate mixes what is multiplied by A^T A, or by B B^T.
    weight, a, b, gradient, _ = random_layer(out=6, columns=6, rank=3)
    gradient = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    (gradient[2:] if dim == 0 else gradient[:, 2:]).zero_()
    a, b = (a, torch.zeros_like(b)) if init == "peft" else (torch.zeros_like(a), b)
    grads = backward(weight, a, b, gradient, 2.0)
    scores = score(weight, a, b, *grads, scaling=2.0, dim=dim, block=2)
    assert scores[0] > 0
    apart = (dim == 0) == (init == "peft")
    assert bool(scores[1:].any()) != apart


@pytest.mark.parametrize("dim", [0, 1])
def test_row_blocks_do_not_change_the_scores(dim, monkeypatch):
    tensors = random_layer(out=64, columns=32)
    whole = score(*tensors, scaling=1.0, dim=dim, block=4)
    monkeypatch.setattr(importance, "_BLOCK_ELEMENTS", 5 * 32)  # 5 does not divide 64
    blocked = score(*tensors, scaling=1.0, dim=dim, block=4)
    torch.testing.assert_close(blocked, whole, rtol=1e-5, atol=0)  # order of float32 sums


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements of any tensor that an operation made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else [result]:
            if isinstance(item, torch.Tensor) and "view" not in func.__name__:
                self.numel = max(self.numel, item.numel())
        return result


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", SCORES)
def test_no_temporary_is_larger_than_a_block(name, dim, absolute, monkeypatch):
    monkeypatch.setattr(importance, "_BLOCK_ELEMENTS", 1024)
    weight, a, b, *grads = [t.half() for t in random_layer(out=256, columns=128)]  # casts show
    largest = LargestTensor()
    with largest:
        score(weight, a, b, *grads, name=name, dim=dim, block=1, absolute=absolute)
    # The LoRA factors, (256, 2 * 3), are the only other thing; the weight has 32,768 elements.
    assert largest.numel <= max(1024, 256 * 6)


@pytest.mark.parametrize("name", SCORES)
def test_scoring_leaves_its_arguments_alone(name):
    weight, a, b, *grads = random_layer()
    tensors = [weight, a, b, *grads]
    before = [t.clone() for t in tensors]
    score(weight, a, b, *grads, name=name, scaling=2.0, dim=0, block=4)
    assert all(torch.equal(t, old) for t, old in zip(tensors, before, strict=True))


@pytest.mark.parametrize("name", ["gradient", "magnitude"])
def test_every_score_checks_its_shapes(name):
    weight, a, b, *grads = random_layer()
    with pytest.raises(ValueError, match="do not fit a weight of shape"):
        score(weight, a, b[:5], *grads[:1], grads[1][:5], name=name, dim=0, block=1)
    with pytest.raises(ValueError, match="groups of 5 do not divide a dimension of 12"):
        score(weight, a, b, *grads, name=name, dim=0, block=5)


def test_refuses_factors_of_another_layer():
    weight, a, b, grad_a, grad_b = random_layer()
    with pytest.raises(ValueError, match="do not fit a weight of shape"):
        score(weight, a, b[:5], grad_a, grad_b[:5], dim=0, block=1)


def test_refuses_a_block_that_does_not_divide():
    with pytest.raises(ValueError, match="groups of 5 do not divide a dimension of 12"):
        score(*random_layer(), scaling=1.0, dim=0, block=5)


def test_moving_average_matches_the_loop():
    history = torch.rand(7, 5, generator=torch.Generator().manual_seed(1))
    average = {}
    for scores in history:
        apply_moving_average(average, {"layers.0.heads": scores.clone()}, decay=0.9)
    expected = torch.tensor(reference.moving_average(history.tolist(), 0.9))
    torch.testing.assert_close(average["layers.0.heads"], expected)


def test_permuting_heads_permutes_their_importance():
    weight, a, b, grad_a, grad_b = random_layer()
    rows = torch.arange(12).view(3, 4)[[2, 0, 1]].flatten()  # three heads of four rows
    plain = score(weight, a, b, grad_a, grad_b, dim=0, block=4)
    moved = score(weight[rows], a, b[rows], grad_a, grad_b[rows], dim=0, block=4)
    torch.testing.assert_close(moved, plain[[2, 0, 1]])
