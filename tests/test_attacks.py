"""Every file that a command reads, damaged in every way: one sentence, and nothing else happens."""

import pytest

from lpdeploy.benchmark.results import LatencyResult, LatencyRow
from lpdeploy.benchmark.stage import save_latency
from lpdeploy.machine import describe_machine
from tools.measure.attacks import CASES, attack, list_damages, make

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("attacks")
    make(root, bench=False)
    row = LatencyRow(
        model="m", ratio=0.5, engine="torch", precision="fp32", merged=True, phase="decode",
        tokens=8, batch=1, median_ms=2, p10_ms=1, p90_ms=3, tokens_per_s=500, relative=1,
        limit_share=None, peak_bytes=None, repeats=3, parameters=10, bytes=40,
    )  # fmt: skip
    save_latency(LatencyResult(describe_machine(), {}, (row,)), root / "run" / "bench.json")
    return root


@pytest.mark.parametrize(("file", "command"), CASES)
def test_a_damaged_file_gives_one_sentence(root, file, command):
    found = {
        damage.name: attack(root, file, damage, command)
        for damage in list_damages(root / file, few=True)
    }
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


def test_there_are_hundreds_of_cases(root):
    count = sum(len(list(list_damages(root / file, few=True))) for file, _ in CASES)
    assert count >= 800
