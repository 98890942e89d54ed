import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lpdeploy.models.adapters import get_base_linear, get_lora_weights
from lpdeploy.models.groups import list_group_specs
from lpdeploy.pruning import importance
from lpdeploy.pruning.importance import (
    apply_moving_average,
    compute_importance,
    compute_lora_importance,
)
from tests import reference
from tests.helpers import make_lora_model

# Both sides are float32 sums of squares in another order; the loops run in float64.
RTOL = 1e-4


def random_layer(out=12, columns=8, rank=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(out, columns), (rank, columns), (out, rank), (rank, columns), (out, rank)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize(("dim", "block"), [(0, 1), (0, 4), (1, 1), (1, 2)])
def test_matches_the_loops_of_the_paper(dim, block):
    tensors = random_layer()
    scores = compute_lora_importance(*tensors, scaling=2.0, dim=dim, block=block)
    every = reference.weight_importance(*[t.double().tolist() for t in tensors], 2.0)
    expected = torch.tensor(reference.group_importance(every, dim, block))
    torch.testing.assert_close(scores, expected, rtol=RTOL, atol=0, check_dtype=False)


@pytest.mark.parametrize("dim", [0, 1])
def test_row_blocks_do_not_change_the_scores(dim, monkeypatch):
    tensors = random_layer(out=64, columns=32)
    whole = compute_lora_importance(*tensors, scaling=1.0, dim=dim, block=4)
    monkeypatch.setattr(importance, "_BLOCK_ELEMENTS", 5 * 32)  # 5 does not divide 64
    blocked = compute_lora_importance(*tensors, scaling=1.0, dim=dim, block=4)
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


@pytest.mark.parametrize("dim", [0, 1])
def test_no_temporary_is_larger_than_a_block(dim, monkeypatch):
    monkeypatch.setattr(importance, "_BLOCK_ELEMENTS", 1024)
    tensors = [t.half() for t in random_layer(out=256, columns=128)]  # half: a cast would show
    largest = LargestTensor()
    with largest:
        compute_lora_importance(*tensors, scaling=1.0, dim=dim, block=1)
    # The LoRA factors, (256, 2 * 3), are the only other thing; the weight has 32,768 elements.
    assert largest.numel <= max(1024, 256 * 6)


def test_refuses_factors_of_another_layer():
    weight, a, b, grad_a, grad_b = random_layer()
    with pytest.raises(ValueError, match="do not fit a weight of shape"):
        compute_lora_importance(weight, a, b[:5], grad_a, grad_b, scaling=1.0, dim=0, block=1)


def test_refuses_a_block_that_does_not_divide():
    with pytest.raises(ValueError, match="groups of 5 do not divide a dimension of 12"):
        compute_lora_importance(*random_layer(), scaling=1.0, dim=0, block=5)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_spec_sums_over_all_its_linears(kv_heads, tmp_path):
    model = make_lora_model(tmp_path, kv_heads=kv_heads)
    causal_lm = model.get_base_model()
    ids = torch.arange(24).view(2, 12) % 50
    model(input_ids=ids, labels=ids).loss.backward()
    specs = list_group_specs(causal_lm.config)
    scores = compute_importance(causal_lm, specs)
    for spec in (specs[0], specs[3]):
        expected = torch.zeros(spec.num_groups, dtype=torch.float64)
        for piece in spec.slices:
            linear = causal_lm.get_submodule(piece.module)
            lora = get_lora_weights(linear)
            parts = [get_base_linear(linear).weight, lora.lora_a, lora.lora_b]
            parts += [lora.lora_a.grad, lora.lora_b.grad]
            every = reference.weight_importance(
                *[p.detach().double().tolist() for p in parts], lora.scaling
            )
            groups = reference.group_importance(every, piece.dim, piece.block)
            expected += torch.tensor(groups, dtype=torch.float64)
        torch.testing.assert_close(
            scores[spec.name], expected, rtol=RTOL, atol=0, check_dtype=False
        )


def test_needs_gradients(tmp_path):
    causal_lm = make_lora_model(tmp_path).get_base_model()
    with pytest.raises(ValueError, match="call backward first"):
        compute_importance(causal_lm, list_group_specs(causal_lm.config))


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
    plain = compute_lora_importance(weight, a, b, grad_a, grad_b, scaling=1.0, dim=0, block=4)
    moved = compute_lora_importance(
        weight[rows], a, b[rows], grad_a, grad_b[rows], scaling=1.0, dim=0, block=4
    )
    torch.testing.assert_close(moved, plain[[2, 0, 1]])
