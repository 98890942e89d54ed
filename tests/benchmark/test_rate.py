"""The learning rate, where it is chosen by trial."""

import json
import math
import threading
from dataclasses import replace

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from lpdeploy.benchmark import rate
from lpdeploy.benchmark.rate import (
    RATES,
    choose_rate,
    climb,
    count_trial_steps,
    put_chosen_first,
    split_held_out,
)
from lpdeploy.benchmark.target import resolve_options
from lpdeploy.cli.main import main
from lpdeploy.config import PruneConfig
from lpdeploy.errors import ArtifactError, LpdeployError, NonFiniteError, RunEndedError
from lpdeploy.pruning import training as training_module
from lpdeploy.pruning.ranks import Ranks
from lpdeploy.pruning.run import prune
from lpdeploy.pruning.setup import build_training, load_dataset, load_source
from lpdeploy.pruning.target import RateTrial, TargetRecord
from lpdeploy.pruning.training import run_steps
from lpdeploy.pruning.walk import collect_calibration, measure_loss
from lpdeploy.run_folder import RunFolder
from tests.helpers import make_text, make_tiny_model

OPTIONS = {
    "batch_size": 4, "micro_batch_size": 2, "seq_len": 24, "steps": 12, "round_to": 4,
    "device": "cpu", "calibration_samples": 4, "lr": "auto",
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("rate") / "base", heads=4, kv_heads=2)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return make_text(tmp_path_factory.mktemp("text") / "text.txt", documents=100)


class TestClimb:
    @pytest.mark.parametrize("best", RATES)
    def test_it_finds_the_rate_that_loses_least(self, best):
        def measure(lr):
            return 2 + abs(math.log(lr / best))

        trials = climb(measure)
        assert min(trials, key=lambda trial: trial.loss).lr == best
        assert [trial.lr for trial in trials] == sorted(trial.lr for trial in trials)
        # From the first rate to the best, and to both of its neighbours.
        assert len(trials) <= abs(RATES.index(best) - RATES.index(1e-3)) + 3

    def test_it_goes_down_from_rates_that_diverge(self):
        trials = climb(lambda lr: math.inf if lr > 5e-5 else 3 - lr)
        assert min(trials, key=lambda trial: trial.loss).lr == 3e-5

    def test_where_all_diverge_it_ends(self):
        assert {trial.loss for trial in climb(lambda _: math.inf)} == {math.inf}

    def test_of_equally_good_rates_the_lowest_is_chosen(self):
        trials = [RateTrial(lr, loss) for lr, loss in ((1e-3, 2.1), (3e-3, 2.01), (1e-2, 2.0))]
        assert [trial.lr for trial in put_chosen_first(trials)] == [3e-3, 1e-3, 1e-2]
        trials[1] = RateTrial(3e-3, 2.03)
        assert put_chosen_first(trials)[0].lr == 1e-2


@pytest.mark.parametrize(
    ("steps", "expected"), [(1, 1), (12, 10), (100, 10), (200, 20), (600, 60), (40_000, 100)]
)
def test_a_trial_is_a_tenth_of_the_steps(steps, expected):
    assert count_trial_steps(steps) == expected


@pytest.mark.parametrize("criterion", ["lora", "gate"])
def test_each_trial_begins_where_a_training_of_its_own_would(base, text, criterion):
    options = PruneConfig(**{**OPTIONS, "criterion": criterion})
    source = load_source(str(base), options)
    dataset = load_dataset(source, str(text), options)
    trials = choose_rate(source, dataset, options)
    assert len(trials) > 1
    assert len({trial.loss for trial in trials}) == len(trials)
    for trial in trials:
        assert measure_alone(source, dataset, options, lr=trial.lr) == trial.loss


def measure_alone(source, dataset, options, *, lr):
    """Return the loss after a training of its own, as long as a trial."""
    # Of 12 steps, the last event is after the third, and the rate is held until then.
    options = replace(options, schedule="separate", steps=10, lr_hold=0.25, lr=lr)
    rows, held_out = split_held_out(dataset, options)
    training = build_training(source, rows, options, None)
    for _ in run_steps(training):
        pass
    judges = collect_calibration(
        dataset, held_out, micro_batch_size=2, autocast=training.autocast, ranks=Ranks()
    )
    return measure_loss(training.state.model, judges)


def test_what_judges_is_not_trained_on(base, text):
    options = PruneConfig(**OPTIONS)
    source = load_source(str(base), options)
    dataset = load_dataset(source, str(text), options)
    few = dataset.select(range(20))
    rows, held_out = split_held_out(few, options)
    assert len(held_out) == 5
    kept = [row.tobytes() for row in np.split(rows.tokens, rows.offsets[1:-1])]
    whole = [row.tobytes() for row in np.split(few.tokens, few.offsets[1:-1])]
    assert len(kept) == 15
    assert sorted(kept + [whole[row] for row in held_out]) == sorted(whole)
    with pytest.raises(LpdeployError, match="needs rows to train on and others to judge by, .* 7"):
        choose_rate(source, dataset.select(range(7)), options)


def test_a_rate_that_diverges_leaves_the_next_trial_alone(base, text, monkeypatch):
    options = PruneConfig(**OPTIONS)
    source = load_source(str(base), options)
    dataset = load_dataset(source, str(text), options)
    expected = measure_alone(source, dataset, options, lr=3e-4)
    run_forward = training_module.run_forward

    def spoil(training, *given, **named):
        loss = run_forward(training, *given, **named)
        return loss * math.nan if training.options.lr >= 1e-3 else loss

    monkeypatch.setattr(training_module, "run_forward", spoil)
    trials = {trial.lr: trial.loss for trial in choose_rate(source, dataset, options)}
    assert {lr for lr, loss in trials.items() if loss == math.inf} == {1e-3, 3e-3}
    assert trials[3e-4] == expected


def test_it_ends_when_it_is_told_to(base, text):
    stop = threading.Event()
    stop.set()
    with pytest.raises(RunEndedError):
        resolve_options(str(base), PruneConfig(**OPTIONS), data=str(text), stop=stop)


def test_a_resumed_run_may_have_another_rate_in_the_end(base, text, tmp_path):
    config = PruneConfig(**OPTIONS, target_params=9_000)
    given = {"data": str(text), "output": tmp_path / "run"}
    chosen, record = resolve_options(str(base), config, **given)
    prune(str(base), tmp_path / "run", data=str(text), options=chosen, target=record)
    lower = replace(config, lr=1e-5)
    assert resolve_options(str(base), lower, **given, resume=True)[0] == replace(chosen, lr=1e-5)
    plain = PruneConfig(**{**OPTIONS, "lr": 1e-3})
    prune(str(base), tmp_path / "plain", data=str(text), options=plain)
    given["output"] = tmp_path / "plain"
    with pytest.raises(ArtifactError, match="began with nothing left open"):
        resolve_options(str(base), PruneConfig(**OPTIONS), **given, resume=True)


def test_what_was_chosen_is_kept_for_a_resumed_run(base, text, tmp_path, told):
    config = PruneConfig(**OPTIONS)
    given = {"data": str(text), "output": tmp_path / "run"}
    chosen, record = resolve_options(str(base), config, **given)
    assert chosen == replace(config, lr=record.rates[0].lr)
    assert f"chosen: `lr={chosen.lr:g}`" in told
    assert not any("removed" in line or "refitted" in line for line in told)
    prune(str(base), tmp_path / "run", data=str(text), options=chosen, target=record)
    assert resolve_options(str(base), config, **given, resume=True) == (chosen, record)
    with pytest.raises(ArtifactError, match="began with another target: ratio 0.5, lr auto"):
        resolve_options(str(base), replace(config, ratio=0.2), **given, resume=True)


def test_it_is_chosen_for_the_shape_that_was_chosen(base, text, monkeypatch):
    seen = []

    def choose(_, __, options, *, ranks):
        seen.append(options)
        return [RateTrial(3e-4, 2.0)]

    monkeypatch.setattr("lpdeploy.benchmark.target.choose_rate", choose)
    config = PruneConfig(**OPTIONS, target_params=9_000)
    chosen, record = resolve_options(str(base), config, data=str(text))
    assert seen == [config.with_ratios(**record.ratios)]
    assert chosen == replace(seen[0], lr=3e-4)
    assert record.asked == {"parameters": 9_000, "lr": "auto"}


def test_depth_and_rate_may_both_be_open(base, text):
    config = PruneConfig(**OPTIONS, depth="auto")
    chosen, record = resolve_options(str(base), config, data=str(text))
    assert record.trials
    assert record.rates
    assert chosen == replace(config, depth=None, **record.ratios, lr=record.rates[0].lr)
    assert TargetRecord.from_json(record.to_json()) == record
    assert record.asked == {"ratio": 0.5, "depth": "auto", "lr": "auto"}


def test_where_no_rate_works_it_says_so(base, text, monkeypatch):
    monkeypatch.setattr(rate, "measure_loss", lambda *_: math.nan)
    with pytest.raises(NonFiniteError, match="not finite with any learning rate"):
        resolve_options(str(base), PruneConfig(**OPTIONS), data=str(text))


def test_an_open_rate_is_refused_where_a_number_is_needed(base, text, tmp_path):
    config = PruneConfig(**OPTIONS)
    with pytest.raises(ValueError, match="`lr='auto'` is still open"):
        prune(str(base), tmp_path / "run", data=str(text), options=config)
    with pytest.raises(ValueError, match="one-shot'` trains nothing"):
        PruneConfig(lr="auto", schedule="one-shot")
    with pytest.raises(ValueError, match="`lr` is 'best'; it must be a finite number above 0, or "):
        PruneConfig(lr="best")


def test_on_the_command_line_and_in_a_recipe(base, text, tmp_path):
    words = ["prune", str(base), "--data", str(text), "--output", str(tmp_path / "run")]
    for name, value in {**OPTIONS, "checkpoint_every": 5}.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    rates = json.loads((tmp_path / "run" / "target.json").read_text())["rates"]
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["prune"]
    assert recipe["lr"] == rates[0]["lr"]
    for lr in ("AUTO", "0"):
        result = CliRunner().invoke(main, [*words, "--lr", lr])
        assert result.exit_code == 2
    assert (
        "'AUTO' is neither a number nor auto"
        in CliRunner().invoke(main, [*words, "--lr=AUTO"]).stderr
    )


@pytest.mark.parametrize(
    "rates", [[], *([{"lr": lr, "loss": 2.0}] for lr in (-1.0, "NaN", 10**400))], ids=len
)
def test_a_damaged_record_is_refused(base, text, tmp_path, rates):
    config = PruneConfig(**OPTIONS)
    given = {"data": str(text), "output": tmp_path / "run"}
    chosen, record = resolve_options(str(base), config, **given)
    prune(str(base), tmp_path / "run", data=str(text), options=chosen, target=record)
    run = RunFolder(tmp_path / "run")
    with run.recorded(run.target):
        run.target.write_text(json.dumps({**record.to_json(), "rates": rates}))
    with pytest.raises(ArtifactError, match=r"target\.json (cannot be used|lacks what)"):
        resolve_options(str(base), config, **given, resume=True)


@pytest.mark.parametrize("as_json", [False, True])
def test_an_interrupt_says_that_there_is_nothing_to_resume(
    base, text, tmp_path, monkeypatch, as_json
):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("lpdeploy.benchmark.target.choose_rate", interrupt)
    words = ["prune", str(base), "--data", str(text), "--output", str(tmp_path / "run")]
    words += [
        "--lr=auto",
        "--steps=20",
        "--seq-len=24",
        "--device=cpu",
        *(["--json"] if as_json else []),
    ]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 130
    said = json.loads(result.stdout)["error"] if as_json else result.stderr
    assert "no run to resume" in str(said)
    assert not (tmp_path / "run").exists()
