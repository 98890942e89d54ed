import math

import pytest

from lpdeploy.engines.verification import Pair, VerifyResult
from lpdeploy.engines.weight_checks import WeightsCheck
from lpdeploy.report.verdict import judge
from tests.report.facts import (
    AFTER,
    BEFORE,
    make_bench,
    make_evaluation,
    make_facts,
    make_figures,
    make_row,
)

FINE = VerifyResult((Pair("a", "b", 1e-6, 3.0, 1.0, 1e-4, ok=True),))
DIFFERENT = VerifyResult((Pair("a", "b", 0.5, 3.0, 0.9, 1e-4, ok=False),))
WRONG = VerifyResult((), (WeightsCheck("a", "b", 9, ("w",)),))


def judge_growth(before, after, verification=FINE, **changes):
    base = make_figures(before, **changes.pop("base", {}))
    own = make_evaluation(make_figures(after, **changes.pop("own", {})), base=base)
    return judge(make_facts(own, verification=verification, **changes))


@pytest.mark.parametrize(
    ("after", "level"),
    [(9.0, "good"), (11.9, "good"), (12.1, "loss"), (14.9, "loss"), (15.1, "bad"),
     (math.nan, "bad"), (math.inf, "bad")],
)  # fmt: skip
def test_quality_makes_the_level(after, level):
    assert judge_growth(10.0, after).level == level


@pytest.mark.parametrize(("after", "level"), [(0.58, "good"), (0.56, "loss"), (0.49, "bad")])
def test_accuracy_makes_the_level_too(after, level):
    verdict = judge_growth(None, None, base={"accuracy": 0.6}, own={"accuracy": after})
    assert verdict.level == level
    assert f"accuracy 60.0 to {100 * after:.1f} % over 1 task" in verdict.headline


@pytest.mark.parametrize("found", [DIFFERENT, WRONG])
def test_a_run_whose_verification_failed_is_never_good(found):
    verdict = judge_growth(10.0, 10.0, verification=found)
    assert verdict.level == "bad"
    assert verdict.word == "Problem"
    assert verdict.findings[0].level == "bad"  # the worst first


def test_the_findings_say_what_differs():
    sentences = [f.sentence for f in judge_growth(10.0, 10.0, verification=DIFFERENT).findings]
    assert sentences[0] == (
        "a and b do not compute the same: logits differ by 5.0e-01, more than 1.0e-04."
    )
    sentences = [f.sentence for f in judge_growth(10.0, 10.0, verification=WRONG).findings]
    assert sentences[0] == "1 of the 9 weights of b are not those of a."


def test_a_run_that_was_not_looked_at_is_not_complete():
    assert judge_growth(10.0, 10.0, verification=None).level == "open"
    assert judge(make_facts(verification=FINE)).level == "open"
    alone = make_evaluation(make_figures(10.0))  # without the dense model beside it
    assert judge(make_facts(alone, verification=FINE)).level == "open"


def test_a_loss_says_more_than_what_is_missing():
    assert judge_growth(10.0, 13.0, verification=None).level == "loss"


def test_an_export_that_loses_much_is_a_problem_of_the_run():
    rounded = make_evaluation(make_figures(20.0), engine="ort", precision="int4")
    plain = make_evaluation(make_figures(10.5), base=make_figures(10.0))
    verdict = judge(make_facts(rounded, plain, verification=FINE))
    assert verdict.level == "bad"
    assert verdict.findings[0].sentence == (
        "On ort int4, perplexity on v.txt is 100 % above the dense model's."
    )
    assert "perplexity 10.00 to 10.50 on v.txt" in verdict.headline


def test_figures_of_other_segments_are_not_compared():
    other = make_evaluation(make_figures(30.0), engine="ort", seq_len=8)
    plain = make_evaluation(make_figures(10.5), base=make_figures(10.0))
    assert judge(make_facts(other, plain, verification=FINE)).level == "good"


def test_the_headline_names_the_engine_that_is_fastest():
    rows = [make_row(parameters=BEFORE), make_row(parameters=BEFORE, engine="ort")]
    pruned = {"ratio": 0.5, "parameters": AFTER}
    rows += [make_row(**pruned, median_ms=1.5, relative=0.75)]
    rows += [make_row(**pruned, engine="ort", median_ms=1.0, relative=0.5)]
    verdict = judge_growth(10.0, 11.0, bench=make_bench(*rows))
    assert verdict.headline == (
        "40 % fewer parameters, decode 2 times as fast on ort fp32, "
        "perplexity 10.00 to 11.00 on v.txt"
    )


def test_a_model_that_is_slower_is_not_good():
    rows = [make_row(parameters=BEFORE), make_row(ratio=0.5, parameters=AFTER, relative=1.1)]
    verdict = judge_growth(10.0, 11.0, bench=make_bench(*rows))
    assert verdict.level == "loss"
    assert verdict.findings[0].sentence == (
        "On torch fp32, decode takes 10 % longer than with the dense model."
    )


def test_a_difference_within_the_spread_is_not_called_slower():
    slower = make_row(ratio=0.5, parameters=AFTER, relative=1.1, p10_ms=1.8)
    verdict = judge_growth(10.0, 11.0, bench=make_bench(make_row(parameters=BEFORE), slower))
    assert verdict.level == "good"
    assert "decode 0.91 times as fast" in verdict.headline


def test_times_that_are_not_steady_are_called_rough():
    rows = [make_row(parameters=BEFORE, p90_ms=4.0)]
    sentences = [f.sentence for f in judge_growth(10, 11, bench=make_bench(*rows)).findings]
    assert "The times are not steady, so the factors above are rough." in sentences
