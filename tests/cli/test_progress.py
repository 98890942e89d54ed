"""Progress bars, as a terminal gets them and as a log file does."""

import pytest

from lpdeploy.cli.progress import counting_progress, training_progress
from lpdeploy.pruning.log import StepInfo

INFO = StepInfo(
    step=3, steps=10, loss=2.5, ratio=0.125, lr=1e-3, tokens_per_s=1234.0, seconds=1.0,
    scoring_seconds=0.01, cutting_seconds=0.0, peak_bytes=2_120_000_000, removed=False,
)  # fmt: skip


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes any stream for a terminal then
    monkeypatch.setenv("COLUMNS", "160")


def test_training_shows_loss_ratio_speed_and_memory(terminal, capsys):
    with training_progress() as on_step:
        on_step(INFO)
    shown = capsys.readouterr()
    for text in ("3/10", "loss 2.500", "12.5%", "1,234 tokens/s", "2.12 GB"):
        assert text in shown.err
    assert shown.out == ""


def test_counting_shows_how_far_it_is(terminal, capsys):
    with counting_progress("eval") as progress:
        progress(2, 5)
    assert "2/5" in capsys.readouterr().err


def test_there_is_no_bar_without_a_terminal(monkeypatch, capsys):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    with training_progress() as on_step:
        on_step(INFO)
    assert capsys.readouterr().err == ""


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
