"""`lpdeploy prune --dry-run`: what it says against what the run does; it leaves nothing."""

import json

import pytest

from lpdeploy.models.costs import compute_prefill_flops
from lpdeploy.models.loading import load_config
from lpdeploy.run_folder import RunFolder
from tests.cli.test_cli import SMALL, check_refused, invoke, last_json
from tests.helpers import list_names


def prune(base, data, run, *words):
    return invoke("prune", base, "--data", data, "--output", run, *SMALL, *words)


def test_it_foretells_the_run(base, data, tmp_path):
    run = tmp_path / "run"
    told = last_json(prune(base, data, run, "--dry-run", "--json"))
    assert not run.exists()
    done = last_json(prune(base, data, run, "--json"))
    plan = RunFolder(run).load_plan()
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert told["steps"] == done["steps"]
    assert told["events"] == [line["step"] for line in log if line["removed"]]
    assert told["kept"] == {
        "KV heads": [len(plan.kept["layers.0.heads"]), 2],
        "channels": [len(plan.kept["layers.0.channels"]), 48],
    }
    compacted = last_json(invoke("compact", run, "--json"))
    assert told["parameters"] == compacted["parameters"]
    planned = json.loads((run / "manifest.json").read_text())["stages"]["prune"]["planned_bytes"]
    assert told["planned_bytes"].keys() == planned.keys()
    assert told["planned_bytes"]["weights"] == planned["weights"]
    assert told["least_seconds"] > 0


def test_what_people_read(base, data, tmp_path):
    result = prune(base, data, tmp_path / "run", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "in 4 steps, and remove groups after step" in result.stdout
    assert "A layer would keep 1 of 2 KV heads and 24 of 48 channels: " in result.stdout
    assert "The pruned model loads in" in result.stdout
    assert "memory: about" in result.stderr
    assert result.stderr.splitlines()[-1] == (
        "Nothing was written but cached tokens. Leave out --dry-run to start."
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--schedule", "one-shot"], "The run would prune in one shot, with"),
        (["--schedule", "separate"], "in 4 steps, and remove groups before the first one."),
        (["--depth", "auto", "--refit"], "Trials would choose what goes, before the first step."),
        (["--target-params", "9K"], "Trials would choose what goes, before the first step."),
        (["--scope", "global"], "24 of 48 channels on average."),
    ],
)
def test_what_is_not_known_yet(base, data, tmp_path, words, said):
    result = prune(base, data, tmp_path / "run", *words, "--dry-run")
    assert result.exit_code == 0, result.output
    assert said in result.stdout


@pytest.mark.parametrize(
    ("words", "sentence", "code"),
    [
        (["--resume"], "--dry-run is for a new run. Leave out --resume.", 2),
        (["--seq-len", "4096"], "--seq-len 4096 is longer than", 1),
    ],
)
def test_it_refuses_what_a_run_refuses(base, data, tmp_path, words, sentence, code):
    check_refused(prune(base, data, tmp_path / "run", *words, "--dry-run"), sentence, code=code)
    assert list_names(tmp_path) == ["base", "text.txt"]


def test_a_run_that_is_there_is_refused_and_left(base, data, tmp_path):
    run = tmp_path / "run"
    assert prune(base, data, run).exit_code == 0
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    check_refused(prune(base, data, run, "--dry-run"), "--overwrite")
    assert prune(base, data, run, "--dry-run", "--overwrite").exit_code == 0
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == before


class TestLeastTime:
    """The operations that it counts, where a machine does one a second."""

    LENGTH = 16  # SMALL's rows, which are packed

    @pytest.fixture
    def count(self, base, data, tmp_path, monkeypatch):
        monkeypatch.setattr("lpdeploy.benchmark.dry_run._measure_products", lambda *_: 1.0)
        output = tmp_path / "run"

        def count(*words):
            words = ("prune", base, "--data", data, "--output", output, *SMALL, *words)
            return last_json(invoke(*words, "--dry-run", "--json"))["least_seconds"]

        return count

    def count_refit_row(self, base):
        """Two streams of hidden states, and half of X'X of the two outputs of each layer."""
        config = load_config(base)
        forward = compute_prefill_flops(config, tokens=self.LENGTH, batch=1)
        heads = config.num_attention_heads * config.head_dim
        sums = config.num_hidden_layers * (heads**2 + config.intermediate_size**2)
        return 2 * forward + self.LENGTH * sums

    def test_scores_without_gradients_take_a_forward_pass_a_row(self, base, count):
        forward = compute_prefill_flops(load_config(base), tokens=self.LENGTH, batch=1)
        words = ("--schedule", "one-shot", "--criterion", "wanda", "--calibration-samples")
        assert count(*words, "3") == pytest.approx(3 * forward)
        assert count(*words, "7") == pytest.approx(7 * forward)

    def test_a_refit_takes_two_streams_and_the_sums_of_each_output(self, base, count):
        words = ("--schedule", "one-shot", "--criterion", "magnitude")
        more = count(*words, "--refit", "--refit-samples", "5") - count(*words)
        assert more == pytest.approx(5 * self.count_refit_row(base))

    def test_a_run_that_drops_layers_alone_refits_once(self, base, count):
        words = ("--drop-layers", "1", "--ratio", "0")
        more = count(*words, "--refit", "--refit-samples", "8") - count(*words)
        assert more == pytest.approx(8 * self.count_refit_row(base))

    def test_each_event_and_each_dropped_layer_count(self, count):
        refit = ("--refit", "--refit-samples", "8")
        joint = ("--criterion", "magnitude", *refit, "--ramp", "paper", "--prune-every")
        one, two = count(*joint, "2"), count(*joint, "1")
        assert two > one
        assert count(*joint, "2", "--drop-layers", "1") > one


def test_it_says_what_is_cut_off_and_how_often_rows_are_seen(base, tmp_path):
    said = [("Hi", "A"), ("Hi", "A long answer, " * 20), ("A long question, " * 20, "A")]
    rows = [json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in said]
    data = tmp_path / "chats.jsonl"
    data.write_text("\n".join(rows))
    words = ("--seq-len", "64", "--prompt-format", "instruction", "--steps", "20", "--dry-run")
    result = prune(base, data, tmp_path / "run", *words, "--json")
    found = last_json(result)
    assert (found["rows"], found["dropped"], found["cut"], found["passes"]) == (2, 1, 1, 20)
    result = prune(base, data, tmp_path / "run", *words, "--no-cache")
    assert (
        "on 2 rows of tokens (dropped as too long: 1; without the end of an answer: 1) in 20"
        in (result.stdout)
    )
    assert "steps, 20 passes over the rows" in result.stdout
    assert result.stderr.splitlines()[-1] == "Nothing was written. Leave out --dry-run to start."
