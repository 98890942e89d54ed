"""Progress bars, as a terminal gets them and as a log file does."""

from dataclasses import replace

import pytest

from lpdeploy.cli import progress
from lpdeploy.cli.progress import counting_progress, draw_sparkline, training_progress
from lpdeploy.pruning.log import StepInfo

INFO = StepInfo(
    step=3, steps=10, loss=2.5, ratio=0.125, lr=1e-3, tokens_per_s=1234.0, seconds=1.0,
    scoring_seconds=0.01, cutting_seconds=0.0, peak_bytes=2_120_000_000, removed=False,
    achieved={"groups": 0.2, "heads": 0.333, "channels": 0.0, "layers": 0.0, "parameters": 0.125},
)  # fmt: skip


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes any stream for a terminal then
    monkeypatch.setenv("COLUMNS", "160")


def test_training_shows_loss_shares_speed_and_memory(terminal, capsys):
    with training_progress() as on_step:
        on_step(INFO)
    shown = capsys.readouterr()
    for text in ("3/10", "loss 2.500", "1,234 tokens/s", "2.12 GB"):
        assert text in shown.err
    assert "removed 33.3% of the heads, 12.5% of the parameters" in shown.err
    assert shown.out == ""


def test_the_last_event_and_the_last_held_out_loss_stay_in_sight(terminal, capsys):
    event = replace(INFO, removed=True, loss_before=2.0, loss_after=3.0, valid_loss=2.75)
    with training_progress() as on_step:
        on_step(event)
        on_step(replace(INFO, step=4, loss=2.6))
    shown = capsys.readouterr().err
    last = shown[shown.index("4/10") :]
    assert "event after step 3: held-out loss 2.000 to 3.000" in last
    assert "valid loss 2.750 after step 3" in last
    assert "loss ▁█" in last


def test_a_sparkline_goes_from_the_lowest_to_the_highest():
    assert draw_sparkline([1.0, 2.0, 3.0]) == "▁▅█"
    assert draw_sparkline([2.0, 2.0]) == "▁▁"


def test_counting_shows_how_far_it_is(terminal, capsys):
    with counting_progress("eval") as progress:
        progress(2, 5)
    assert "2/5" in capsys.readouterr().err


def test_there_is_no_bar_without_a_terminal(monkeypatch, capsys):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    with training_progress() as on_step:
        on_step(INFO)
    assert capsys.readouterr().err == ""


class Clock:
    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_log_file_gets_a_line_a_minute(clock, capsys):
    with counting_progress("eval") as show:
        for done in range(1, 11):  # 25 seconds each
            show(done, 10)
            clock.now += 25
    assert capsys.readouterr().err.splitlines() == [
        "eval: 4 of 10, about 2 min left",  # after 75 s for three
        "eval: 7 of 10, about 1 min left",
    ]


def test_each_text_has_a_time_of_its_own(clock, capsys):
    with counting_progress("eval") as show:
        for done, total in ((1, 3), (2, 3), (3, 3), (1, 3), (2, 3), (1, 5), (3, 5)):
            show(done, total)
            clock.now += 70
    assert capsys.readouterr().err.splitlines() == [
        "eval: 2 of 3, about 1 min left",
        "eval: 2 of 3, about 1 min left",  # of another text that is as long
        "eval: 3 of 5, about 1 min left",  # 70 s for two
    ]


def test_a_log_file_gets_the_loss_of_a_long_training(clock, capsys):
    with training_progress() as on_step:
        on_step(replace(INFO, step=1))
        clock.now += 61
        on_step(replace(INFO, step=3))
    line = (
        "prune: 3 of 10 steps, loss 2.500, removed 33.3% of the heads, 12.5% of the parameters, "
        "about 4 min left"
    )
    assert capsys.readouterr().err.splitlines() == [line]


def test_one_bar_follows_another(terminal, capsys):
    with counting_progress("tokenize") as on_tokenize, training_progress() as on_step:
        on_tokenize(1000, 2000)
        on_tokenize(2000, 2000)
        on_step(INFO)
    shown = capsys.readouterr().err
    assert "tokenize" in shown
    assert "2000/2000" in shown
    assert shown.index("2000/2000") < shown.index("3/10")


def test_a_bar_that_is_never_told_anything_does_not_show(terminal, capsys):
    with counting_progress("tokenize"), training_progress():
        pass
    assert capsys.readouterr().err == ""
