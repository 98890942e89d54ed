"""Commands as real processes: their JSON, their last word, and what is left when one is stopped."""

import json
import threading
import time

import pytest

from lpdeploy.paper.cells import build_cell, identify_source
from lpdeploy.paper.run import CommandError, Commands, check_output, run_cell
from lpdeploy.paper.stage import build_evaluation, build_study
from lpdeploy.paper.tables import Row
from tests.paper.conftest import PRUNE, load_cells

pytestmark = pytest.mark.slow


@pytest.fixture
def study(base, texts):
    data, valid = texts
    return build_study(
        str(base),
        data=str(data),
        prune_words=PRUNE,
        prune_options={"steps": 4},
        evaluation=build_evaluation([str(valid)], seq_len=32, tasks=(), task_data=None),
    )


def test_table_7_by_real_processes(paper, tmp_path):
    result = paper("7", "--seeds", "1", "--ratios", "0.5", "--rows", "joint", "--json")
    assert result.exit_code == 0, result.output
    # No terminal: the commands and what they say, without bars.
    assert "lpdeploy prune base --data text.txt" in result.stderr
    assert "rows of at most" in result.stderr
    assert "\x1b" not in result.stderr
    document = json.loads(result.stdout.splitlines()[-1])
    [cell] = load_cells(tmp_path / "out").values()
    # A process of its own has loaded torch and transformers, whatever ran before.
    assert cell["prune"]["peak_bytes"] > 100e6
    assert cell["training"]["step_seconds"] > 0
    assert document["rows"][0]["values"]["valid.txt"]["mean"] > 1
    before = (tmp_path / "out" / "cells" / f"{cell['key']}.json").stat().st_mtime_ns
    assert paper("7", "--seeds", "1", "--ratios", "0.5", "--rows", "joint").exit_code == 0
    assert (tmp_path / "out" / "cells" / f"{cell['key']}.json").stat().st_mtime_ns == before


def test_a_failed_command_is_reported_by_its_last_line():
    with pytest.raises(CommandError, match="No such option '?--stepz") as error:
        Commands().call(["prune", "model", "--stepz", "4"])
    assert not error.value.killed


def test_a_stopped_prune_leaves_its_checkpoint(study, tmp_path):
    words = [*PRUNE, "--steps", "4000", "--checkpoint-every", "1"]
    long = build_study(
        study.model.given,
        data=study.data.given,
        prune_words=words,
        prune_options={"steps": 4000},
        evaluation=study.evaluation,
    )
    cell = build_cell(Row("r", "r"), long, ratio=0.5, seed=0)
    commands = Commands()
    run = tmp_path / "work" / cell.key / "run"

    def stop():
        deadline = time.monotonic() + 120
        while not (run / "checkpoint" / "state.safetensors").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        commands.stop()

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(CommandError) as error:
        run_cell(cell, study=long, folder=tmp_path, commands=commands)
    thread.join()
    assert error.value.killed
    assert (run / "checkpoint" / "state.safetensors").is_file()
    assert not (tmp_path / "cells").exists() or not any((tmp_path / "cells").iterdir())
    with pytest.raises(CommandError):  # no more start
        commands.call(["doctor"])


def test_a_folder_with_cells_is_ours(tmp_path):
    (tmp_path / "cells").mkdir()
    (tmp_path / "notes.txt").touch()
    check_output(tmp_path)
    check_output(tmp_path / "new")


def test_hub_names_are_their_own_identity():
    assert identify_source("owner/name:train").name == "owner/name:train"
