"""Tables from end to end: what runs, what is never run again, what is shared, what failed."""

import fcntl
import json
import re
import time

import pytest
from safetensors.torch import load_file

from lpdeploy.paper.run import CommandError
from tests.paper.conftest import PRUNE, load_cells

SEEDS = ["--seeds", "2", "--ratios", "0.5"]


def load_table(folder, stem):
    return json.loads((folder / f"{stem}.json").read_text())


@pytest.mark.slow
def test_table_7_runs_once_and_shares_its_cells_with_table_2(paper, recorder, tmp_path):
    first = paper("7", *SEEDS, "--json")
    assert first.exit_code == 0, first.output
    # All rows of seed 0 first.
    pruned = [words for words in recorder.commands if words[0] == "prune"]
    order = [(w[w.index("--schedule") + 1], w[w.index("--seed") + 1]) for w in pruned]
    assert order == [("joint", "0"), ("separate", "0"), ("joint", "1"), ("separate", "1")]
    assert recorder.list_verbs() == ["prune", "compact", "eval"] * 4

    cells = load_cells(tmp_path / "out")
    document = json.loads(first.stdout.splitlines()[-1])
    assert document == load_table(tmp_path / "out", "table-7")
    assert document["missing"] == 0
    joint = document["rows"][0]
    measured = [
        cells[key]["eval"]["perplexity"]["valid.txt"]["perplexity"] for key in joint["cells"]
    ]
    assert len(set(measured)) == 2  # two seeds are two runs
    assert joint["values"]["valid.txt"]["mean"] == pytest.approx(sum(measured) / 2)
    assert joint["paper"] == {"WikiText2": 18.37, "PTB": 28.68, "average": 0.4971}
    for suffix in (".md", ".svg"):
        assert (tmp_path / "out" / f"table-7{suffix}").stat().st_size > 500
    assert not any((tmp_path / "out" / "work").iterdir())  # no weights are left

    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "cells").iterdir()}
    recorder.commands.clear()
    assert paper("7", *SEEDS).exit_code == 0
    assert recorder.commands == []
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "cells").iterdir()}

    # Joint pruning by LoRA's gradients is a row of Table 2; only the unpruned model is new.
    assert paper("2", *SEEDS, "--rows", "dense,lora").exit_code == 0
    assert recorder.list_verbs() == ["eval"]
    table = load_table(tmp_path / "out", "table-2")
    assert table["rows"][1]["values"]["valid.txt"]["mean"] == joint["values"]["valid.txt"]["mean"]
    assert [row["ratio"] for row in table["rows"]] == [0.0, 0.5]


def test_a_cell_says_how_it_was_made_without_paths(paper, recorder, tmp_path):
    assert paper("7", "--seeds", "1", "--ratios", "0.5", "--rows", "separate").exit_code == 0
    [cell] = load_cells(tmp_path / "out").values()
    assert cell["commands"][0].startswith(
        "lpdeploy prune base --data text.txt --output run --steps 4 "
    )
    assert cell["commands"][0].endswith("--schedule separate --ratio 0.5 --seed 0")
    assert cell["commands"][2].startswith("lpdeploy eval run --perplexity valid.txt --seq-len 32")
    assert cell["options"]["schedule"] == "separate"
    assert cell["training"]["steps"] == 4
    assert cell["prune"]["achieved"]["groups"] == 0.5
    assert cell["machine"]["versions"]["torch"]
    assert str(tmp_path) not in json.dumps(cell)
    for name in ("table-7.json", "table-7.md", "table-7.svg"):
        assert str(tmp_path) not in (tmp_path / "out" / name).read_text()


@pytest.mark.slow
def test_a_failed_cell_leaves_the_others_and_is_tried_again(paper, recorder, tmp_path):
    error = CommandError("The loss became nan at step 3.", killed=False)
    recorder.fail_at[("prune", "--schedule joint")] = error
    failed = paper("7", "--seeds", "1", "--ratios", "0.5")
    assert failed.exit_code == 1
    assert "1 of 2 cells failed. First error: The loss became nan at step 3." in failed.stderr
    assert [c["options"]["schedule"] for c in load_cells(tmp_path / "out").values()] == ["separate"]
    text = (tmp_path / "out" / "table-7.md").read_text()
    assert "1 of 2 cells are missing." in text
    assert "Failed: Joint, 50%, seed 0: The loss became nan at step 3." in text
    assert not any((tmp_path / "out" / "work").iterdir())

    recorder.fail_at.clear()
    recorder.commands.clear()
    assert paper("7", "--seeds", "1", "--ratios", "0.5").exit_code == 0
    assert recorder.list_verbs() == ["prune", "compact", "eval"]
    assert "missing" not in (tmp_path / "out" / "table-7.md").read_text()


def test_two_failures_in_a_row_with_the_same_sentence_stop_the_table(paper, recorder):
    recorder.fail_at[("prune", "")] = CommandError("No such file.", killed=False)
    result = paper("7", "--seeds", "3")
    assert result.exit_code == 1
    assert "Two cells in a row failed with the same error: No such file." in result.stderr
    assert len(recorder.commands) == 2


def test_a_killed_cell_goes_on_after_its_prune(paper, recorder, tmp_path):
    recorder.fail_at[("eval", "")] = CommandError("", killed=True)
    assert paper("7", "--seeds", "1", "--ratios", "0.5", "--rows", "joint").exit_code == 1
    recorder.fail_at.clear()
    recorder.commands.clear()
    assert paper("7", "--seeds", "1", "--ratios", "0.5", "--rows", "joint").exit_code == 0
    assert recorder.list_verbs() == ["compact", "eval"]


@pytest.mark.slow
def test_a_killed_prune_goes_on_from_its_checkpoint(paper, recorder, monkeypatch, tmp_path):
    prune = [*PRUNE, "--checkpoint-every", "2"]
    words = ["--seeds", "1", "--ratios", "0.5", "--rows", "joint"]
    call = recorder.call

    def kill(words):  # what a killed prune leaves: a checkpoint and the log up to some step
        if words[0] != "prune":
            return call(words)
        from lpdeploy.pruning import run

        with monkeypatch.context() as patch:
            patch.setattr(run, "save_results", lambda *_: (_ for _ in ()).throw(OSError("killed")))
            with pytest.raises(CommandError):
                call(words)
        raise CommandError("", killed=True)

    monkeypatch.setattr(recorder, "call", kill)
    assert paper("7", *words, prune=prune).exit_code == 1
    [left] = (tmp_path / "out" / "work").iterdir()
    assert (left / "run" / "checkpoint" / "state.safetensors").is_file()

    monkeypatch.setattr(recorder, "call", call)
    recorder.commands.clear()
    assert paper("7", *words, prune=prune).exit_code == 0
    assert recorder.commands[0][-1] == "--resume"
    [cell] = load_cells(tmp_path / "out").values()
    assert cell["training"]["steps"] == 4
    assert cell["undisturbed"] is False  # its seconds are not those of a whole run
    assert "--resume" not in cell["commands"][0]

    # So Table 4 does not take its times, and measures anew; Table 7 keeps them afterwards.
    recorder.commands.clear()
    result = paper("4", "--seeds", "1", "--rows", "lora", prune=prune)
    assert result.exit_code == 0, result.output
    assert recorder.list_verbs() == ["prune", "compact", "eval"]
    [cell] = load_cells(tmp_path / "out").values()
    assert cell["undisturbed"] is True


@pytest.mark.slow
def test_a_cost_table_reports_costs_against_its_first_row(paper, recorder, tmp_path):
    result = paper("6", "--seeds", "1", perplexity=False)
    assert result.exit_code == 0, result.output
    assert recorder.list_verbs() == ["prune"] * 3
    assert "--offload-gradients" in recorder.commands[1]
    rows = load_table(tmp_path / "out", "table-6")["rows"]
    cells = load_cells(tmp_path / "out")
    for row in rows:
        [key] = row["cells"]
        values = row["values"]
        assert values["total time"]["mean"] == cells[key]["prune"]["seconds"]
        assert values["s/iter"]["mean"] == cells[key]["training"]["step_seconds"]
        base = rows[0]["values"]["s/iter"]["mean"]
        assert values["s/iter"]["relative"] == pytest.approx(values["s/iter"]["mean"] / base)
    assert "(+0.0%)" in (tmp_path / "out" / "table-6.md").read_text()


@pytest.mark.slow
def test_figure_4_compares_the_masks_of_two_criteria(paper, recorder, tmp_path):
    result = paper("figure-4", "--seeds", "2", "--ratios", "0.25,0.5", perplexity=False)
    assert result.exit_code == 0, result.output
    assert recorder.list_verbs() == ["prune"] * 4
    document = load_table(tmp_path / "out", "figure-4")
    scores = {}
    for key, cell in load_cells(tmp_path / "out").items():
        path = tmp_path / "out" / "cells" / f"{key}.importance.safetensors"
        scores[cell["options"]["criterion"], cell["seed"]] = load_file(path)
    shares = []
    for seed in (0, 1):
        for layer in (0, 1):
            name = f"layers.{layer}.channels"
            gone = [
                set(scores[criterion, seed][name].argsort()[:24].tolist())
                for criterion in ("lora", "gradient")
            ]
            shares.append(1 - len(gone[0] ^ gone[1]) / 48)
    [row] = [r for r in document["rows"] if r["ratio"] == 0.5 and r["name"] == "channels"]
    assert row["values"]["agreement"]["n"] == 4
    assert row["values"]["agreement"]["mean"] == pytest.approx(sum(shares) / 4)
    assert row["values"]["random agreement"]["mean"] == 0.5
    # At 25 % neither of two KV heads goes: there is no mask to compare.
    [heads] = [r for r in document["rows"] if r["ratio"] == 0.25 and r["name"] == "heads"]
    assert heads["values"] == {}


@pytest.mark.slow
def test_figure_6_scales_the_steps_and_shares_what_is_the_same_run(paper, recorder, tmp_path):
    result = paper("figure-6", "--seeds", "1", "--rows", "ema-0.9,steps-0.5x,steps-1x")
    assert result.exit_code == 0, result.output
    assert recorder.list_verbs() == ["prune", "compact", "eval"] * 2
    assert sorted(c["prune"]["steps"] for c in load_cells(tmp_path / "out").values()) == [2, 4]


def test_render_only_runs_nothing(paper, recorder, tmp_path):
    words = ["--seeds", "1", "--ratios", "0.5"]
    assert paper("7", *words, "--rows", "joint").exit_code == 0
    recorder.commands.clear()
    result = paper("7", *words, "--render-only")
    assert result.exit_code == 0, result.output
    assert recorder.commands == []
    assert "1 of 2 cells are missing." in result.stdout
    empty = paper("7", *words, "--render-only", folder="other")
    assert empty.exit_code == 1
    assert re.search("holds no cell of this table. Leave --render-only out", empty.stderr)


def test_jobs_run_side_by_side(paper, recorder, tmp_path, monkeypatch):
    running, most = set(), []

    def call(words):
        running.add(id(words))
        most.append(len(running))
        time.sleep(0.3)
        running.discard(id(words))
        raise CommandError(f"{words[-3:]}", killed=False)

    monkeypatch.setattr(recorder, "call", call)
    assert paper("7", "--seeds", "2", "--jobs", "2").exit_code == 1
    assert max(most) == 2


def test_one_process_at_a_time_runs_cells(paper, recorder, tmp_path):
    (tmp_path / "out" / "cells").mkdir(parents=True)
    with (tmp_path / "out" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = paper("7", "--seeds", "1")
    assert result.exit_code == 1
    assert "is in use by another lpdeploy process" in result.stderr
    assert recorder.commands == []


def test_segments_longer_than_the_model_are_refused_before_anything_runs(paper, recorder):
    result = paper("7", "--seeds", "1", "--ratios", "0.5", "--eval-seq-len", "4096")
    assert result.exit_code == 1
    assert re.search(
        r"--eval-seq-len 4096: '.*' has \d+ positions\. Use --eval-seq-len \d+ or less",
        result.stderr,
    )
    assert recorder.commands == []
