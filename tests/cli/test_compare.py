"""`lpdeploy compare`: refusals, and what scripts read."""

import json
import shutil

import pytest
from click.testing import CliRunner

from lpdeploy.cli.main import main
from lpdeploy.config import PruneConfig
from lpdeploy.pruning.run import prune


def invoke(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture
def runs(base, data, tmp_path):
    options = PruneConfig(
        steps=2, batch_size=2, micro_batch_size=2, seq_len=16, round_to=4, device="cpu"
    )
    prune(str(base), tmp_path / "a", data=str(data), options=options)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    return tmp_path / "a", tmp_path / "b"


def test_a_script_reads_the_rows_and_the_page(runs, tmp_path):
    page = tmp_path / "page.html"
    result = invoke("compare", *runs, "--output", page, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [row["name"] for row in found["rows"]] == ["dense", "a", "b"]
    assert found["rows"][1]["criterion"] == "lora"
    assert found["rows"][1]["method"].startswith("chosen by LoRA's gradients")
    assert found["page"] == str(page)
    assert "2 pruned forms of base" in page.read_text()
    assert "criterion" in invoke("compare", *runs).stdout


def test_one_run_or_the_same_one_twice_is_wrong_usage(runs):
    for words, sentence in (
        ((runs[0],), "a comparison needs two runs or more; give another one."),
        ((runs[0], runs[0]), "is given twice; give each run once."),
    ):
        result = invoke("compare", *words)
        assert result.exit_code == 2
        assert sentence in result.stderr
    assert invoke("compare", runs[0], runs[0].parent / "none").exit_code == 2


def test_what_cannot_be_compared_fails_with_one_sentence(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    result = invoke("compare", runs[0], tmp_path / "empty", "--json")
    assert result.exit_code == 1
    assert "No plan.json in" in json.loads(result.stdout)["error"]["message"]
    assert "Traceback" not in result.output
