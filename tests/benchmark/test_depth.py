"""The number of dropped layers, where it is chosen by trial."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig

from lpdeploy.benchmark import depth
from lpdeploy.benchmark.depth import choose_depth, spread
from lpdeploy.benchmark.target import resolve_options
from lpdeploy.benchmark.trial_cache import TrialCache
from lpdeploy.config import PruneConfig
from lpdeploy.criteria import CRITERIA
from lpdeploy.errors import ArtifactError, LpdeployError, NonFiniteError
from lpdeploy.models.compact import compact
from lpdeploy.models.loading import load_config
from lpdeploy.models.shapes import build_counter, count_parameters, forecast_config
from lpdeploy.pruning import run as pruning
from lpdeploy.pruning import training
from lpdeploy.pruning.target import SizeFound, TargetRecord
from lpdeploy.run_folder import RunFolder
from tests.helpers import make_text, make_tiny_model, set_launcher

OPTIONS = {
    "batch_size": 4, "micro_batch_size": 2, "seq_len": 24, "steps": 2, "round_to": 4,
    "device": "cpu", "calibration_samples": 4, "depth": "auto",
}  # fmt: skip
GIVEN = (SimpleNamespace(config=LlamaConfig()), None, PruneConfig(**OPTIONS))


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("deep") / "base", num_hidden_layers=4)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return make_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.mark.parametrize(
    ("depths", "expected"),
    [
        ([0], [0]),
        ([1, 2, 3], [1, 2, 3]),
        (list(range(4)), [0, 1, 2, 3]),
        (list(range(7)), [0, 2, 4, 6]),
        (list(range(17)), [0, 5, 11, 16]),
    ],
    ids=str,
)
def test_some_numbers_are_tried(depths, expected):
    assert spread(depths) == expected


@pytest.mark.parametrize("best", [0, 2, 3])
def test_what_loses_least_is_taken(monkeypatch, best):
    tried = []

    def measure(_, __, options):
        tried.append((options.drop_layers, options.ratio, options.depth))
        return 3.0 + abs(options.drop_layers - best)

    monkeypatch.setattr("lpdeploy.benchmark.depth._try", measure)
    asked = {"ratio": 0.5, "depth": "auto"}
    candidates = [
        TargetRecord(asked, {"ratio": 0.5 - n / 10, "drop_layers": n}, SizeFound(100, 50 - n))
        for n in range(4)
    ]
    record = choose_depth(*GIVEN, candidates, cache=TrialCache())
    assert tried == [(n, 0.5 - n / 10, None) for n in range(4)]
    assert record == replace(candidates[best], trials=record.trials)
    assert [trial.loss for trial in record.trials] == [3.0 + abs(n - best) for n in range(4)]
    assert TargetRecord.from_json(record.to_json()) == record


def test_a_loss_that_is_no_number_is_not_the_least(monkeypatch):
    losses = {0: 3.0, 1: float("nan"), 2: 4.0}
    monkeypatch.setattr(
        "lpdeploy.benchmark.depth._try", lambda *given: losses[given[2].drop_layers]
    )
    candidates = [
        TargetRecord({}, {"ratio": 0.5, "drop_layers": n}, SizeFound(100, 50)) for n in losses
    ]
    record = choose_depth(*GIVEN, candidates, cache=TrialCache())
    assert record.ratios["drop_layers"] == 0
    assert [trial.loss for trial in record.trials] == [3.0, 4.0]
    with pytest.raises(NonFiniteError, match="with any of the shapes"):
        choose_depth(*GIVEN, candidates[1:2], cache=TrialCache())


@pytest.mark.parametrize(
    "asked", [{"ratio": 0.5}, {"target_params": 23_000}, {"target_memory": 92_000}], ids=str
)
def test_every_number_leaves_no_more_than_asked(deep, text, asked):
    options = PruneConfig(**OPTIONS, **asked)
    chosen, record = resolve_options(str(deep), options, data=str(text))
    config = load_config(deep)
    limit = asked.get("target_params") or asked.get("target_memory", 0) // 4
    if not limit:
        plain = PruneConfig(**{**OPTIONS, "depth": None}, **asked)
        limit = build_counter(config, plain.widths)(0.5)
    assert limit < count_parameters(config)
    for trial in record.trials:
        request = options.with_ratios(**trial.ratios).widths
        assert count_parameters(forecast_config(config, request)) <= limit
    tried = [trial.ratios["drop_layers"] for trial in record.trials]
    assert sorted(set(tried)) == list(range(max(tried) + 1))
    kinds = {(t.ratios["drop_layers"], "ratio" in t.ratios) for t in record.trials}
    assert (0, True) in kinds
    # At half of all groups, the channels alone are not enough.
    assert ((0, False) in kinds) == ("ratio" not in asked)
    assert record.trials[-1].ratios["ratio"] == 0  # to drop one more would be too much
    best = min(record.trials, key=lambda trial: trial.loss)
    assert record.ratios == best.ratios
    assert (chosen.depth, chosen.drop_layers) == (None, best.ratios["drop_layers"])


def test_a_trial_is_judged_by_rows_that_it_was_not_fitted_to(deep, text, monkeypatch):
    judged, fitted = set(), set()

    def judge(_, calibration):
        judged.update(map(tuple, calibration.batches[0]["input_ids"].tolist()))
        return 1.0

    accumulate = training._accumulate_gradients

    def watch(own, rows, **keywords):
        fitted.update(map(tuple, own.dataset.collate(rows)["input_ids"].tolist()))
        return accumulate(own, rows, **keywords)

    monkeypatch.setattr("lpdeploy.benchmark.depth.HELD_OUT_ROWS", 4)
    monkeypatch.setattr("lpdeploy.benchmark.depth.measure_loss", judge)
    monkeypatch.setattr(training, "_accumulate_gradients", watch)
    resolve_options(str(deep), PruneConfig(**OPTIONS), data=str(text), cache=False)
    assert judged
    assert fitted
    assert not judged & fitted


class TestCache:
    """A trial is made once for all that it depends on."""

    @pytest.fixture
    def made(self, monkeypatch, tmp_path):
        """The options of the trials that were really made, in a cache of their own."""
        made = []
        run = depth._try
        monkeypatch.setenv("LPDEPLOY_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(depth, "_try", lambda *given: made.append(given[2]) or run(*given))
        return made

    def test_a_choice_that_was_stopped_goes_on(self, deep, text, made, monkeypatch):
        asked = PruneConfig(**OPTIONS, ratio=0.5)
        whole = resolve_options(str(deep), asked, data=str(text), cache=False)
        trials = len(made)
        assert trials > 2
        counting = depth._try

        def stop(*given):
            if len(made) == trials + 2:
                raise KeyboardInterrupt
            return counting(*given)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(depth, "_try", stop)
            resolve_options(str(deep), asked, data=str(text))
        assert resolve_options(str(deep), asked, data=str(text)) == whole
        assert len(made) == 2 * trials
        assert [options.drop_layers for options in made[:trials]] == [
            options.drop_layers for options in made[trials:]
        ]

    @pytest.mark.parametrize(
        ("changes", "anew"),
        [
            ({"lr": 0.5, "steps": 9, "distill": 0.5, "checkpoint_every": 3}, False),
            ({"lr_warmup": 0.1, "lr_hold": 0.2, "max_grad_norm": 2.0}, False),
            ({"steps": None, "epochs": 3}, False),
            ({"seed": 1}, True),
            ({"criterion": "magnitude"}, True),
            ({"refit": True}, True),
            ({"calibration_samples": 8}, True),
            ({"protect_first": 1}, True),
        ],
        ids=str,
    )
    def test_what_changes_a_trial_makes_it_anew(self, deep, text, made, changes, anew):
        resolve_options(str(deep), PruneConfig(**OPTIONS, ratio=0.5), data=str(text))
        before = len(made)
        changed = PruneConfig(**{**OPTIONS, "ratio": 0.5, **changes})
        resolve_options(str(deep), changed, data=str(text))
        assert (len(made) > before) == anew

    def test_other_rows_and_another_model_make_it_anew(self, deep, text, made, tmp_path):
        asked = PruneConfig(**OPTIONS, ratio=0.5)
        resolve_options(str(deep), asked, data=str(text))
        before = len(made)
        other = make_text(tmp_path / "other.txt", seed=5)
        resolve_options(str(deep), asked, data=str(other))
        assert len(made) == 2 * before
        model = make_tiny_model(tmp_path / "base", num_hidden_layers=4, seed=3)
        resolve_options(str(model), asked, data=str(text))
        assert len(made) == 3 * before

    def test_a_damaged_file_is_made_anew(self, deep, text, made, tmp_path, caplog):
        asked = PruneConfig(**OPTIONS, ratio=0.5)
        first = resolve_options(str(deep), asked, data=str(text))
        before = len(made)
        damaged = ["", '{"loss": "x"}', "{}", "[1]", '{"loss": "NaN"}']
        files = sorted((tmp_path / "cache" / "trials").iterdir())
        for file, contents in zip(files, damaged, strict=False):
            file.write_text(contents)
        assert resolve_options(str(deep), asked, data=str(text)) == first
        assert len(made) == before + min(len(files), len(damaged))
        assert "trying anew" in caplog.text

    def test_a_criterion_from_outside_is_tried_each_time(self, deep, text, made, monkeypatch):
        outside = replace(CRITERIA["magnitude"], name="mine")
        monkeypatch.setitem(CRITERIA, "mine", outside)
        asked = PruneConfig(**{**OPTIONS, "criterion": "mine", "ratio": 0.5})
        for _ in range(2):
            resolve_options(str(deep), asked, data=str(text))
        assert len({(each.drop_layers, each.ratio) for each in made}) * 2 <= len(made)

    def test_nothing_is_kept_without_a_cache(self, deep, text, made, tmp_path):
        asked = PruneConfig(**OPTIONS, ratio=0.5)
        for _ in range(2):
            resolve_options(str(deep), asked, data=str(text), cache=False)
        assert len(made) % 2 == 0
        assert not (tmp_path / "cache" / "trials").exists()


def test_a_run_records_what_was_tried_and_goes_on_with_it(deep, text, tmp_path):
    options, run = PruneConfig(**OPTIONS, target_params=23_000), tmp_path / "run"
    given = {"data": str(text), "output": run}
    chosen, record = resolve_options(str(deep), options, **given)
    pruning.prune(str(deep), **given, options=chosen, target=record)
    assert json.loads((run / "target.json").read_text())["trials"]
    assert resolve_options(str(deep), options, **given, resume=True) == (chosen, record)
    parameters = compact(run).record.parameters["after"]
    assert parameters <= 23_000
    with pytest.raises(LpdeployError, match="began with another target"):
        other = PruneConfig(**OPTIONS, target_params=22_000)
        resolve_options(str(deep), other, **given, resume=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"drop_layers": 1}, "chooses what `drop_layers` says"),
        ({"head_ratio": 0.0}, "chooses what `head_ratio` says"),
        ({"shard": True}, "give `drop_layers` instead"),
    ],
    ids=str,
)
def test_options_that_contradict_it_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        PruneConfig(**OPTIONS, **options)


@pytest.mark.parametrize(
    ("limit", "words"), [(100, "out of reach"), (10**6, "has .* parameters already")]
)
def test_targets_that_cannot_be_met(deep, text, limit, words):
    options = PruneConfig(**OPTIONS, target_params=limit)
    with pytest.raises(LpdeployError, match=words):
        resolve_options(str(deep), options, data=str(text))


def test_several_processes_are_refused(deep, text, monkeypatch):
    set_launcher(monkeypatch)
    with pytest.raises(LpdeployError, match="`depth` is measured by one process"):
        resolve_options(str(deep), PruneConfig(**OPTIONS), data=str(text))


def test_until_it_is_chosen_there_are_no_ratios():
    with pytest.raises(ValueError, match="`depth` is still open"):
        PruneConfig(**OPTIONS).ratios  # noqa: B018


def test_a_ratio_that_removes_nothing_is_refused(deep, text):
    with pytest.raises(LpdeployError, match="`ratio` 0 removes nothing of"):
        resolve_options(str(deep), PruneConfig(**OPTIONS, ratio=0.0), data=str(text))


@pytest.mark.parametrize(
    ("name", "value"),
    [("drop_layers", 1.5), ("drop_layers", -1), ("ratio", 1.5), ("batch_size", 1)],
)
def test_a_target_that_was_changed_is_refused(deep, text, tmp_path, name, value):
    given = {"data": str(text), "output": tmp_path / "run"}
    options = PruneConfig(**OPTIONS)
    chosen, record = resolve_options(str(deep), options, **given)
    pruning.prune(str(deep), **given, options=chosen, target=record)
    path = tmp_path / "run" / "target.json"
    data = json.loads(path.read_text())
    data["ratios"][name] = value
    with RunFolder(tmp_path / "run").recorded(path):
        path.write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match=r"target\.json.* cannot be used"):
        resolve_options(str(deep), options, **given, resume=True)


def test_without_a_run_there_is_nothing_to_resume(deep, text, tmp_path):
    given = {"data": str(text), "output": tmp_path / "run"}
    with pytest.raises(ArtifactError, match="holds no run"):
        resolve_options(str(deep), PruneConfig(**OPTIONS), **given, resume=True)


def test_where_no_layer_may_go_none_does(deep, text):
    options = PruneConfig(**OPTIONS, ratio=0.5, protect_first=3)
    _, record = resolve_options(str(deep), options, data=str(text))
    assert {trial.ratios["drop_layers"] for trial in record.trials} == {0}
