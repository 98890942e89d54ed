import itertools
import math

import pytest

from lpdeploy.pruning.schedule import Schedule, compute_learning_rate
from tests import reference


def test_matches_the_table_of_the_reference():
    shares = [(0.1, 0.1), (0.05, 0.5), (0.0, 0.0)]
    for steps, (warmup, cooldown) in itertools.product((100, 200, 217, 600), shares):
        case = f"{steps} steps, warm-up {warmup}, cool-down {cooldown}"
        schedule = Schedule(ratio=0.5, steps=steps, every=10, warmup=warmup, cooldown=cooldown)
        table = reference.schedule(0.5, steps, 10, warmup, cooldown)
        assert schedule.list_events() == list(table), case
        for step, ratio in table.items():
            assert schedule.compute_ratio(step) == pytest.approx(ratio), case


def test_last_event_lands_on_the_target_exactly():
    for steps in (1, 3, 9, 10, 11, 50, 1000):
        schedule = Schedule(ratio=0.37, steps=steps)
        events = schedule.list_events()
        assert 1 <= events[0] <= events[-1] <= steps, steps
        assert schedule.compute_ratio(events[-1]) == 0.37, steps
        assert schedule.compute_ratio(steps) == 0.37, steps


def test_ratio_never_falls_and_starts_at_zero():
    schedule = Schedule(ratio=0.5, steps=200)
    ratios = [schedule.compute_ratio(step) for step in range(201)]
    assert ratios[0] == 0
    assert ratios == sorted(ratios)


def test_cubic_takes_most_groups_early():
    schedule = Schedule(ratio=0.5, steps=200)
    events = schedule.list_events()
    assert schedule.compute_ratio(events[len(events) // 2]) > 0.4


def test_learning_rate_warms_up_then_follows_a_cosine():
    rates = [
        compute_learning_rate(step, steps=100, peak=1.0, warmup_steps=10) for step in range(1, 101)
    ]
    assert rates[4] == pytest.approx(0.5)
    assert rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.5 * (1 + math.cos(math.pi * 45 / 90)))
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.001


def test_learning_rate_holds_its_peak_then_follows_a_cosine():
    rates = [
        compute_learning_rate(step, steps=100, peak=2.0, warmup_steps=5, hold_steps=40)
        for step in range(1, 101)
    ]
    assert rates[4:41] == [2.0] * 37  # steps 5 to 41: the cosine starts at its top
    assert rates[70] == pytest.approx(1 + math.cos(math.pi * 30 / 60))
    assert rates[41:] == sorted(rates[41:], reverse=True)


def test_learning_rate_without_warm_up_starts_at_the_peak():
    assert compute_learning_rate(1, steps=10, peak=0.3, warmup_steps=0) == 0.3


def test_pruning_at_once_has_one_event_before_the_first_step():
    for kind, steps in itertools.product(("separate", "one-shot"), (0, 1, 200)):
        schedule = Schedule(ratio=0.37, steps=steps, kind=kind)
        assert schedule.list_events() == [0], (kind, steps)
        ratios = {schedule.compute_ratio(step) for step in range(steps + 1)}
        assert ratios == {0.37}, (kind, steps)


@pytest.mark.parametrize("kind", ["joint", "separate"])
def test_without_groups_to_remove_there_is_no_event(kind):
    schedule = Schedule(ratio=0.0, steps=20, kind=kind)
    assert schedule.list_events() == []
    assert schedule.last_event == 0
    assert schedule.describe() == "no groups to remove"
    assert {schedule.compute_ratio(step) for step in range(21)} == {0.0}


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        (Schedule(ratio=0.5, steps=100), "9"),
        (Schedule(ratio=0.5, steps=12), "1, so that all groups go at once after step 10"),
        (
            Schedule(ratio=0.5, steps=8),
            "1, so that all groups go at once after step 7, which is no multiple of 10",
        ),
        (Schedule(ratio=0.5, steps=8, kind="separate"), "1"),
    ],
)
def test_a_single_event_is_told(schedule, said):
    assert schedule.describe() == f"pruning events: {said}"
