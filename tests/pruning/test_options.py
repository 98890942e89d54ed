import pytest

from lpdeploy.pruning.options import PruneOptions


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"ratio": 1.0}, r"ratio 1.0 is outside \[0, 1\)"),
        ({"ratio": -0.1}, r"ratio -0.1 is outside \[0, 1\)"),
        ({"batch_size": 10, "micro_batch_size": 4}, "4 does not divide --batch-size 10"),
        ({"warmup": 0.6, "cooldown": 0.4}, "leave no steps for pruning"),
        ({"steps": 0}, "steps 0 is below 1"),
        (
            {"schedule": "separate", "calibration_samples": 0},
            "separate prunes before .* which cannot be 0; leave it out for 128",
        ),
        ({"schedule": "one-shot", "calibration_samples": 0}, "one-shot prunes before"),
    ],
)
def test_impossible_options_are_refused(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        PruneOptions(**values)


@pytest.mark.parametrize("name", ["criterion", "schedule", "ramp"])
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match=f"no {name} 'oneshot'; use one of "):
        PruneOptions(**{name: "oneshot"})


@pytest.mark.parametrize("load_in", ["8bit", "4bit"])
def test_gradients_of_a_quantised_base_are_refused(load_in):
    with pytest.raises(ValueError, match=f"a base in {load_in} has none"):
        PruneOptions(criterion="gradient", load_in=load_in)


def test_a_ramp_gives_the_pauses_that_are_not_given():
    assert PruneOptions(ramp="authors").pauses == (0.1, 0.1)
    assert PruneOptions(ramp="paper", cooldown=0.2).pauses == (0.0, 0.2)


@pytest.mark.parametrize(
    ("schedule", "ramp", "given", "rows"),
    [
        ("joint", "authors", None, 0),
        ("joint", "paper", None, 0),
        ("joint", "early", None, 128),
        ("joint", "early", 0, 0),
        ("joint", "authors", 32, 32),
        ("separate", "authors", None, 128),
        ("one-shot", "early", None, 128),
        ("one-shot", "early", 5, 5),
    ],
)
def test_rows_of_the_calibration(schedule, ramp, given, rows):
    options = PruneOptions(schedule=schedule, ramp=ramp, calibration_samples=given)
    assert options.num_calibration_rows == rows
