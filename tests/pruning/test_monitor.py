"""How the model stands after each step, against what the finished run is."""

import json
import math
from contextlib import nullcontext

import pytest
import yaml

from lpdeploy.config import PruneConfig
from lpdeploy.errors import LpdeployError, NonFiniteError
from lpdeploy.models.compact import compact
from lpdeploy.models.loading import load_model
from lpdeploy.pruning import monitor
from lpdeploy.pruning.ranks import Ranks
from lpdeploy.pruning.setup import load_dataset, load_source
from lpdeploy.pruning.walk import collect_calibration
from tests.helpers import make_text
from tests.pruning.test_depth import compute_mean_loss
from tests.pruning.test_run import StoppedError, load_log, run, stop_after


@pytest.fixture
def valid(tmp_path):
    return str(make_text(tmp_path / "valid.txt", seed=7))


def test_the_last_line_says_what_the_finished_model_is(base, data, valid, tmp_path):
    options = {"eval_every": 3, "eval_samples": 5}
    result = run(base, tmp_path / "run", data, valid=valid, options=options)
    log = load_log(tmp_path / "run")
    measured = [line["step"] for line in log if line["valid_loss"] is not None]
    assert measured == [3, 6, 8]
    assert log[-1]["achieved"] == result.achieved
    assert log[0]["achieved"]["groups"] == 0

    compact(tmp_path / "run")
    config = PruneConfig(seq_len=24)
    dataset = load_dataset(load_source(str(base), config), valid, config)
    given = {"micro_batch_size": 2, "autocast": nullcontext, "ranks": Ranks()}
    rows = collect_calibration(dataset, list(range(5)), **given)
    expected = compute_mean_loss(load_model(tmp_path / "run" / "model"), rows)
    assert log[-1]["valid_loss"] == pytest.approx(expected, rel=1e-5)  # LoRA is merged there


def test_shares_change_where_groups_go_and_only_there(base, data, tmp_path):
    run(base, tmp_path / "run", data)
    shares = [line["achieved"]["parameters"] for line in load_log(tmp_path / "run")]
    assert shares == sorted(shares)
    for before, line in zip(shares, load_log(tmp_path / "run")[1:], strict=False):
        assert line["removed"] or line["achieved"]["parameters"] == before


def test_ten_measurements_unless_another_number_is_asked_for(base, data, valid, tmp_path):
    run(base, tmp_path / "run", data, valid=valid, options={"steps": 20})
    log = load_log(tmp_path / "run")
    measured = [line["step"] for line in log if line["valid_loss"] is not None]
    assert measured == list(range(2, 21, 2))


def test_measuring_changes_nothing_of_the_run(base, data, valid, tmp_path):
    run(base, tmp_path / "plain", data)
    run(base, tmp_path / "watched", data, valid=valid, options={"eval_every": 1})
    for name in ("plan.json", "adapter/adapter_model.safetensors", "importance.safetensors"):
        plain, watched = ((tmp_path / r / name).read_bytes() for r in ("plain", "watched"))
        assert plain == watched, name


def test_a_resumed_run_may_measure_otherwise(base, data, valid, tmp_path):
    with pytest.raises(StoppedError):
        run(base, tmp_path / "run", data, on_step=stop_after(5))
    run(base, tmp_path / "run", data, resume=True, valid=valid, options={"eval_every": 2})
    log = load_log(tmp_path / "run")
    assert [line["step"] for line in log if line["valid_loss"] is not None] == [4, 6, 8]
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["prune"]
    assert recipe["valid"] == valid


def test_another_text_than_before_is_told(base, data, valid, tmp_path, caplog):
    caplog.set_level("WARNING", logger="lpdeploy")
    other = str(make_text(tmp_path / "other.txt", seed=8))
    with pytest.raises(StoppedError):
        run(base, tmp_path / "run", data, valid=valid, on_step=stop_after(5))
    run(base, tmp_path / "run", data, resume=True, valid=other)
    (told,) = [r.getMessage() for r in caplog.records if "of the former text" in r.getMessage()]
    assert told.startswith(f"`valid` was '{valid}' when the run began, and is '{other}' now: ")


def test_one_shot_measures_after_the_removal(base, data, valid, tmp_path):
    options = {"schedule": "one-shot", "calibration_samples": 4}
    run(base, tmp_path / "run", data, valid=valid, options=options)
    (line,) = load_log(tmp_path / "run")
    assert line["valid_loss"] > 0
    assert line["achieved"]["groups"] == 0.5


@pytest.mark.parametrize("name", ["eval_every", "eval_samples"])
def test_there_must_be_something_to_measure_on(base, data, tmp_path, name):
    with pytest.raises(LpdeployError, match=f"^`{name}` belongs to `valid`. Give that too"):
        run(base, tmp_path / "run", data, options={name: 3})
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number_keeps_the_state_before_it(
    base, data, valid, tmp_path, monkeypatch
):
    monkeypatch.setattr(monitor, "measure_loss", lambda *_: math.nan)
    with pytest.raises(NonFiniteError, match="The loss on `valid` became nan after step 4"):
        run(base, tmp_path / "run", data, valid=valid, options={"eval_every": 4})
    assert (tmp_path / "run" / "checkpoint" / "state.safetensors").is_file()
    assert json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])["step"] == 3


def test_an_event_that_is_not_to_stand_changes_no_share(base, data, tmp_path):
    options = {"max_loss_increase": 1e-9, "drop_layers": 1, "round_to": 1}
    result = run(base, tmp_path / "run", data, options=options)
    log = load_log(tmp_path / "run")
    assert not log[-1]["removed"]
    assert log[-1]["achieved"] == result.achieved
