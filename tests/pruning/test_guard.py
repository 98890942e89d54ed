"""What an event costs on held-out rows, and the limit that ends a run with the last good state."""

from contextlib import nullcontext

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from lpdeploy.cli.main import main
from lpdeploy.config import PruneConfig
from lpdeploy.data.batches import list_batch
from lpdeploy.engines.verify import verify
from lpdeploy.errors import LpdeployError
from lpdeploy.models.compact import compact
from lpdeploy.models.loading import load_model
from lpdeploy.plan import load_plan
from lpdeploy.pruning import training as steps
from lpdeploy.pruning.pruner import LoRAPruner
from lpdeploy.pruning.ranks import Ranks
from lpdeploy.pruning.setup import load_dataset, load_source
from lpdeploy.pruning.walk import collect_calibration, list_calibration_rows, list_held_out
from tests.helpers import make_lora_model, make_tiny_model
from tests.pruning.test_depth import compute_mean_loss
from tests.pruning.test_run import StoppedError, load_log, run, stop_after


def read_events(folder):
    return [line for line in load_log(folder) if line["removed"]]


class TestRows:
    @pytest.fixture
    def dataset(self, base, data):
        options = PruneConfig(seq_len=24, seed=3)
        return load_dataset(load_source(str(base), options), str(data), options)

    def test_they_are_the_last_of_the_first_pass(self, dataset):
        held_out = list_held_out(dataset, seed=3)
        order = list_batch(len(dataset), step=0, batch_size=len(dataset), seed=3)
        assert len(held_out) == len(dataset) // 4
        assert order[-len(held_out) :] == held_out

    @pytest.mark.parametrize("num_rows", [4, 16, 10_000])
    @pytest.mark.parametrize("step", range(4))
    def test_nothing_is_fitted_to_them(self, dataset, step, num_rows):
        rows = list_calibration_rows(dataset, step=step, num_rows=num_rows, seed=3)
        assert rows
        assert not set(rows) & set(list_held_out(dataset, seed=3))


@pytest.mark.parametrize("options", [{}, {"removal": "mask"}, {"refit": True}], ids=str)
def test_every_event_says_what_it_costs(base, data, tmp_path, options):
    run(base, tmp_path / "run", data, options=options)
    log = load_log(tmp_path / "run")
    assert len(read_events(tmp_path / "run")) == 3
    for line in log:
        given = [line["loss_before"] is not None, line["loss_after"] is not None]
        assert given == [line["removed"]] * 2
    costs = [line["loss_after"] - line["loss_before"] for line in read_events(tmp_path / "run")]
    assert any(costs)  # an event may remove nothing, where counts are rounded


def test_the_losses_are_those_of_the_models(base, data, tmp_path):
    """One-shot: of the unpruned model, and of what compact writes."""
    options = {"schedule": "one-shot", "calibration_samples": 4, "lora_dropout": 0.0}
    run(base, tmp_path / "run", data, options=options)
    compact(tmp_path / "run")
    config = PruneConfig(seq_len=24)
    dataset = load_dataset(load_source(str(base), config), str(data), config)
    rows = collect_calibration(
        dataset,
        list_held_out(dataset, seed=0)[-16:],
        micro_batch_size=2,
        autocast=nullcontext,
        ranks=Ranks(),
    )
    (event,) = read_events(tmp_path / "run")
    for name, folder in (("loss_before", base), ("loss_after", tmp_path / "run" / "model")):
        expected = compute_mean_loss(load_model(folder), rows)
        assert event[name] == pytest.approx(expected, rel=1e-4)


@pytest.fixture
def costly(monkeypatch):
    """Let the event after a step cost a nat."""
    real = steps.watch_event

    def make(costly_step):
        def watch(training, step, remove):
            if step == costly_step:
                losses = iter([2.0, 3.0])
                monkeypatch.setattr("lpdeploy.pruning.guard.measure_loss", lambda *_: next(losses))
            return real(training, step, remove)

        monkeypatch.setattr(steps, "watch_event", watch)

    return make


@pytest.mark.parametrize(
    "options",
    [{}, {"removal": "mask"}, {"refit": True}, {"calibration_samples": 4}],
    ids=str,
)
def test_the_run_ends_with_the_state_before_the_event(base, data, tmp_path, costly, told, options):
    # Without a limit, the same run is stopped there; its checkpoint has the state after the step.
    with pytest.raises(StoppedError):
        run(base, tmp_path / "other", data, options=options, on_step=stop_after(3))
    costly(4)
    result = run(base, tmp_path / "run", data, options={"max_loss_increase": 0.9, **options})
    plan = load_plan(tmp_path / "run" / "plan.json")
    assert 0 < plan.achieved["groups"] < 0.45
    last = load_log(tmp_path / "run")[-1]
    assert (last["step"], last["removed"]) == (4, False)
    assert (last["loss_before"], last["loss_after"]) == (2.0, 3.0)
    assert result.steps == 4
    assert any("from 2.000 to 3.000, by more than `max_loss_increase` 0.9" in s for s in told)
    assert any("after step 4 of 8" in line for line in told)
    scores = load_file(tmp_path / "run" / "importance.safetensors")
    assert all(torch.isfinite(score).all() for score in scores.values())
    compact(tmp_path / "run")
    verify(tmp_path / "run", engine="torch").check()


def test_with_room_enough_the_run_is_the_same(base, data, tmp_path):
    run(base, tmp_path / "plain", data)
    run(base, tmp_path / "run", data, options={"max_loss_increase": 100.0})
    for name in ("adapter/adapter_model.safetensors", "importance.safetensors", "plan.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_dropped_layers_are_something_to_end_with(data, tmp_path, costly):
    base = make_tiny_model(tmp_path / "deep", num_hidden_layers=3)
    costly(0)
    options = {"max_loss_increase": 0.9, "schedule": "separate", "drop_layers": 1, "refit": True}
    run(base, tmp_path / "run", data, options=options)
    plan = load_plan(tmp_path / "run" / "plan.json")
    assert plan.achieved["layers"] == pytest.approx(1 / 3)
    assert plan.achieved["groups"] == pytest.approx(1 / 3)
    compact(tmp_path / "run")
    verify(tmp_path / "run", engine="torch").check()
    assert "33% of its layers" in (tmp_path / "run" / "model" / "README.md").read_text()


@pytest.mark.parametrize("schedule", ["joint", "one-shot"])
def test_where_the_first_event_costs_too_much_nothing_is_written(
    base, data, tmp_path, costly, schedule
):
    costly(2 if schedule == "joint" else 0)
    with pytest.raises(LpdeployError, match="It was the first event"):
        run(
            base, tmp_path / "run", data,
            options={"max_loss_increase": 0.9, "schedule": schedule},
        )  # fmt: skip
    assert not (tmp_path / "run" / "plan.json").exists()


def test_a_loss_that_is_no_number_is_too_much(base, data, tmp_path, monkeypatch):
    monkeypatch.setattr("lpdeploy.pruning.guard.measure_loss", lambda *_: float("nan"))
    with pytest.raises(LpdeployError, match="to nan, by more than"):
        run(base, tmp_path / "run", data, options={"max_loss_increase": 0.9})


def test_the_limit_may_change_when_a_run_goes_on(base, data, tmp_path):
    options = {"max_loss_increase": 50.0}
    with pytest.raises(StoppedError):
        run(base, tmp_path / "run", data, options=options, on_step=stop_after(4))
    run(base, tmp_path / "run", data, options={"max_loss_increase": 60.0}, resume=True)
    assert (tmp_path / "run" / "plan.json").exists()


def test_the_page_shows_the_events(base, data, tmp_path):
    run(base, tmp_path / "run", data)
    result = CliRunner().invoke(main, ["report", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    page = next((tmp_path / "run").glob("*.html")).read_text()
    for event in read_events(tmp_path / "run"):
        assert f"<td>{event['loss_after']:.3f}</td>" in page


def test_a_loop_of_ones_own_has_no_such_rows(tmp_path):
    with pytest.raises(ValueError, match="only lpdeploy.prune has"):
        LoRAPruner(make_lora_model(tmp_path), PruneConfig(max_loss_increase=1.0), total_steps=8)
