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
    ],
)
def test_impossible_options_are_refused(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        PruneOptions(**values)
