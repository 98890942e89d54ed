"""What experiment trackers are told, read back from TensorBoard's own files."""

import pytest

from lpdeploy.errors import LpdeployError, MissingDependencyError
from lpdeploy.pruning import tracking
from tests.helpers import make_text
from tests.pruning.test_run import load_log, run


def read_scalars(folder):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator(str(folder))
    accumulator.Reload()
    return {
        tag: {event.step: event.value for event in accumulator.Scalars(tag)}
        for tag in accumulator.Tags()["scalars"]
    }


def test_tensorboard_gets_what_the_log_gets(base, data, tmp_path):
    valid = str(make_text(tmp_path / "valid.txt", seed=7))
    run(base, tmp_path / "run", data, report_to=["tensorboard"], valid=valid)
    scalars = read_scalars(tmp_path / "run" / "tensorboard")
    log = load_log(tmp_path / "run")
    names = {"train/loss": "loss", "valid/loss": "valid_loss", "event/loss_after": "loss_after"}
    for tag, name in names.items():
        expected = {line["step"]: line[name] for line in log if line[name] is not None}
        assert scalars[tag] == pytest.approx(expected), tag
    gone = {line["step"]: line["achieved"]["parameters"] for line in log}
    assert scalars["removed/parameters"] == pytest.approx(gone)


@pytest.mark.parametrize("work", ["__init__", "start", "log", "finish"])
def test_a_tracker_that_fails_does_not_end_the_run(base, data, tmp_path, monkeypatch, caplog, work):
    from accelerate.tracking import TensorBoardTracker

    def fail(*_, **__):
        raise ConnectionError("the server is gone")

    monkeypatch.setattr(TensorBoardTracker, work, fail)
    run(base, tmp_path / "run", data, report_to=["tensorboard"])
    warnings = [r.getMessage() for r in caplog.records if "takes no more figures" in r.message]
    assert warnings == ["tensorboard takes no more figures (the server is gone)."]
    assert (tmp_path / "run" / "plan.json").is_file()


def test_an_unknown_tracker_is_refused(base, data, tmp_path):
    with pytest.raises(LpdeployError, match="no tracker 'excel'. Use tensorboard, .* or mlflow"):
        run(base, tmp_path / "run", data, report_to=["excel"])


def test_a_tracker_that_is_not_installed_is_refused(base, data, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError, match="Install it with: pip install wandb"):
        run(base, tmp_path / "run", data, report_to=["wandb"])
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_is_named_twice_is_told_once(base, data, tmp_path):
    run(base, tmp_path / "run", data, report_to=["tensorboard", "tensorboard"])
    assert len(list((tmp_path / "run" / "tensorboard").glob("events*"))) == 1


def test_a_replaced_run_leaves_no_curve(base, data, tmp_path):
    run(base, tmp_path / "run", data, report_to=["tensorboard"])
    run(base, tmp_path / "run", data, report_to=["tensorboard"], overwrite=True,
        options={"steps": 4})  # fmt: skip
    assert sorted(read_scalars(tmp_path / "run" / "tensorboard")["train/loss"]) == [1, 2, 3, 4]
