"""Sweeps from end to end: what runs, what is never run again, what is refused, what failed."""

import json
import re

import pytest
from click.testing import CliRunner

from lpdeploy.cli.main import main
from lpdeploy.paper.run import CommandError, Commands
from tests.helpers import make_text, make_tiny_model
from tests.paper.conftest import Recorder

PRUNE = [
    "--steps", "2", "--batch-size", "2", "--micro-batch-size", "2", "--seq-len", "16",
    "--round-to", "4", "--device", "cpu", "--lr", "0.01", "--calibration-samples", "2",
]  # fmt: skip


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(Commands, "call", lambda _, words: recorder.call(words))
    return recorder


@pytest.fixture
def sweep(recorder, tmp_path):
    """Return a function that runs `lpdeploy sweep` on the tiny model."""
    base = make_tiny_model(tmp_path / "base", heads=4, kv_heads=4)
    data, valid = make_text(tmp_path / "text.txt"), make_text(tmp_path / "valid.txt", seed=1)

    def run(*words, prune=PRUNE, measured=("--perplexity", valid, "--eval-seq-len", "32")):
        given = ["sweep", base, "--data", data, "--output", tmp_path / "out", *measured, *words]
        return CliRunner().invoke(main, [str(word) for word in [*given, "--", *prune]])

    return run


def check_refused(result, sentence, *, code):
    assert result.exit_code == code, result.output
    assert sentence in " ".join(result.stderr.split())
    assert "Traceback" not in result.output


@pytest.mark.slow
def test_a_sweep_compares_its_runs_and_does_nothing_twice(sweep, recorder, tmp_path):
    result = sweep("--ratio", "0.25,0.5", "--criterion", "magnitude", "--json")
    assert result.exit_code == 0, result.output
    assert recorder.list_verbs() == ["prune", "compact", "eval"] * 2
    found = json.loads(result.stdout)
    assert [row["name"] for row in found["rows"]] == ["dense", "magnitude-0.25", "magnitude-0.5"]
    assert all(row["perplexity"]["valid.txt"] > 1 for row in found["rows"])
    assert [row["removed"].get("heads") for row in found["rows"]] == [None, 0.25, 0.5]
    assert found["page"] == str(tmp_path / "out" / "compare.html")
    assert "2 pruned forms of base" in (tmp_path / "out" / "compare.html").read_text()
    assert found["failed"] == {}

    recorder.commands.clear()
    assert sweep("--ratio", "0.25,0.5", "--criterion", "magnitude").exit_code == 0
    assert recorder.commands == []
    # More of it shares what is there.
    result = sweep("--ratio", "0.5", "--criterion", "magnitude,random", "--json")
    names = [row["name"] for row in json.loads(result.stdout)["rows"]]
    assert names == ["dense", "magnitude-0.5", "random-0.5"]
    assert recorder.list_verbs() == ["prune", "compact", "eval"]


@pytest.mark.slow
def test_each_stage_that_is_there_is_kept(sweep, recorder):
    recorder.fail_at = {("eval", "out/0.5"): CommandError("no room", killed=False)}
    result = sweep("--ratio", "0.25,0.5,0.75")
    check_refused(
        result,
        "1 of 3 runs failed. First error, of 0.5: no room Run the same command again to retry them",
        code=1,
    )
    assert "0.25" in result.stdout  # what is done is compared all the same
    assert "0.75" in result.stdout
    recorder.commands.clear()
    recorder.fail_at = {}
    assert sweep("--ratio", "0.25,0.5,0.75").exit_code == 0
    assert recorder.list_verbs() == ["eval"]


def test_an_interrupted_prune_goes_on(sweep, recorder, tmp_path):
    recorder.fail_at = {("prune", "0.25"): CommandError("stopped", killed=True)}
    sweep("--ratio", "0.25,0.5")
    checkpoint = tmp_path / "out" / "0.25" / "checkpoint" / "state.safetensors"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    recorder.commands.clear()
    sweep("--ratio", "0.25,0.5")
    assert recorder.commands[0][-1] == "--resume"


@pytest.mark.slow
def test_other_texts_are_measured_without_pruning_again(sweep, recorder, tmp_path):
    assert sweep("--ratio", "0.25,0.5").exit_code == 0
    recorder.commands.clear()
    other = make_text(tmp_path / "other.txt", seed=2)
    measured = ("--perplexity", other, "--eval-seq-len", "32")
    result = sweep("--ratio", "0.25,0.5", "--json", measured=measured)
    assert recorder.list_verbs() == ["eval", "eval"]
    assert set(json.loads(result.stdout)["rows"][1]["perplexity"]) == {"valid.txt", "other.txt"}


def test_two_failures_for_one_reason_end_the_sweep(sweep, recorder):
    recorder.fail_at = {("prune", ""): CommandError("no such thing", killed=False)}
    result = sweep("--ratio", "0.25,0.5,0.75")
    sentence = "Two runs in a row failed with the same error: no such thing Correct that and run"
    check_refused(result, sentence, code=1)
    assert recorder.list_verbs() == ["prune", "prune"]


def test_less_than_two_runs_are_not_compared(sweep, recorder, tmp_path):
    recorder.fail_at = {("prune", "out/0.25"): CommandError("no room", killed=False)}
    result = sweep("--ratio", "0.25,0.5")
    check_refused(result, "1 of 2 runs failed", code=1)
    assert not (tmp_path / "out" / "compare.html").exists()


def test_a_run_is_not_taken_for_one_with_other_options(sweep, recorder):
    assert sweep("--ratio", "0.25,0.5").exit_code == 0
    recorder.commands.clear()
    for prune in ([*PRUNE, "--lora-rank", "4"], [*PRUNE, "--seed", "1"]):
        check_refused(
            sweep("--ratio", "0.25,0.5", prune=prune),
            "0.25' was made of another model or data, or with other options, than are asked for",
            code=1,
        )
    assert recorder.commands == []


def test_a_folder_that_holds_something_else_is_refused(sweep, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    sentence = "out' holds notes.txt, and no sweep.json. Use an empty or a new --output, or one"
    check_refused(sweep("--ratio", "0.25,0.5"), sentence, code=1)


def test_a_preset_of_prune_is_passed_on(sweep, recorder):
    recorder.fail_at = {("prune", ""): CommandError("enough", killed=False)}
    sweep("--ratio", "0.25,0.5", prune=["--preset", "loraprune", *PRUNE])
    given = " ".join(recorder.commands[0])
    assert "--preset loraprune --steps 2" in given
    assert given.endswith("--ratio 0.25 --seed 0 --overwrite")


@pytest.mark.parametrize(
    ("words", "prune", "sentence"),
    [
        (["--ratio", "0.5"], PRUNE, "Give two ratios or more, or two criteria: a sweep compares"),
        (["--ratio", "0.5,0.5"], PRUNE, "Give two ratios or more, or two criteria"),
        (["--ratio", "0.2,0.2000001"], PRUNE, "would have the same name. Give ratios that differ"),
        (["--ratio", "0.5,1.5"], PRUNE, "1.5 is not in the range"),
        (["--ratio", "0.2,0.5", "--criterion", "x"], PRUNE, "'x' is not one of"),
        (["--ratio", "0.2,0.5"], ["--ratio", "0.3"], "--ratio is set for each run. Remove it"),
        (["--ratio", "0.2,0.5"], ["--json"], "--json is set for each run. Remove it from"),
        (["--ratio", "0.2,0.5"], ["--dry-run"], "--dry-run is set for each run. Remove it from"),
        (
            ["--ratio", "0.5", "--criterion", "lora,wanda"],
            ["--criterion", "obs"],
            "--criterion is set for each run. Remove it from the options of prune",
        ),
        (["--ratio", "0.2,0.5"], ["--lr", "x"], "options of prune after '--': .*'x' is neither"),
        (["--ratio", "0.2,0.5", "--steps", "4"], [], "--steps is an option of prune. Put it at"),
        (["--ratio", "0.2,0.5", "--limit", "4"], [], "--limit needs --tasks NAMES. Add it, or"),
    ],
)
def test_wrong_usage_is_refused_before_anything_runs(sweep, recorder, words, prune, sentence):
    result = sweep(*words, prune=prune)
    assert result.exit_code == 2, result.output
    assert re.search(sentence, " ".join(result.stderr.split())), result.stderr
    assert recorder.commands == []


def test_a_sweep_that_measures_nothing_is_refused(sweep, recorder):
    result = sweep("--ratio", "0.25,0.5", measured=())
    check_refused(result, "Give --perplexity SOURCE, --tasks NAMES or both to compare", code=2)
    assert recorder.commands == []
