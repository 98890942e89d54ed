"""OBS: groups are eliminated one after the other, and the others make up for them."""

import pytest
import torch

from lpdeploy.criteria.obs import score_outputs


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def solve_again(weight, inputs, gone):
    """Return the squared change of the output when columns go and the others are solved again."""
    columns = weight.shape[1]
    ridge = 1e-2 * inputs.square().sum(dim=0).mean()
    rows = torch.cat([inputs, ridge.sqrt() * torch.eye(columns, dtype=torch.float64)])
    stay = [column for column in range(columns) if column not in gone]
    wanted = rows @ weight.T
    if not stay:
        return float(wanted.square().sum())
    found = torch.linalg.lstsq(rows[:, stay], wanted).solution
    return float((rows[:, stay] @ found - wanted).square().sum())


def eliminate(weight, inputs, block):
    """Take away group after group, the one whose absence then costs least."""
    groups = weight.shape[1] // block
    order, costs, gone = [], [], []
    while len(order) < groups:
        before = solve_again(weight, inputs, gone)
        losses = {
            group: solve_again(weight, inputs, [*gone, *range(group * block, (group + 1) * block)])
            for group in range(groups)
            if group not in order
        }
        best = min(losses, key=losses.get)
        order.append(best)
        costs.append(losses[best] - before)
        gone += range(best * block, (best + 1) * block)
    return order, costs


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_it_is_what_solving_again_finds(block, seed):
    weight = draw(5, 6 * block, seed=seed)
    inputs = draw(50, 6 * block, seed=seed + 10) @ draw(6 * block, 6 * block, seed=seed + 20)
    scores = score_outputs(weight.float(), (inputs.T @ inputs).float(), block=block)
    order, costs = eliminate(weight, inputs, block)
    assert scores.argsort().tolist() == order
    highest = torch.tensor(costs).cummax(dim=0).values
    torch.testing.assert_close(scores[order].double(), highest.double(), rtol=1e-3, atol=1e-3)


def test_of_two_that_are_alike_one_goes_first():
    inputs = draw(200, 6)
    inputs[:, 3] = inputs[:, 1]
    weight = draw(4, 6)
    weight[:, [1, 3]] *= 3  # larger than the others
    order = score_outputs(weight, inputs.T @ inputs, block=1).argsort().tolist()
    assert order[0] in (1, 3)
    assert order[-1] in (1, 3)


@pytest.mark.parametrize("groups", [40, 100])
def test_many_groups_go_in_rounds_and_each_is_scored(groups):
    weight, inputs = draw(5, groups), draw(300, groups)
    scores = score_outputs(weight, inputs.T @ inputs, block=1)
    assert scores.shape == (groups,)
    assert scores.dtype == torch.float32
    assert (scores > 0).all()
    alone = weight.square().sum(dim=0) / torch.linalg.inv(inputs.T @ inputs).diagonal()
    assert int(scores.argmin()) == int(alone.argmin())


def test_inputs_that_never_act_cost_nothing():
    weight = draw(4, 6)
    inputs = draw(50, 6)
    inputs[:, 2] = 0
    assert int(score_outputs(weight, inputs.T @ inputs, block=1).argmin()) == 2
    assert score_outputs(weight, torch.zeros(6, 6), block=2).isfinite().all()


def test_what_it_is_given_stays_as_it_is():
    weight, gram = draw(4, 6).float(), torch.eye(6)
    given = weight.clone(), gram.clone()
    score_outputs(weight, gram, block=2)
    assert torch.equal(weight, given[0])
    assert torch.equal(gram, given[1])
