"""Every file that a command reads, damaged in every way: one sentence, and nothing else happens."""

import pytest

from tools.measure.attacks import CASES, attack, list_damages, make

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("attacks")
    make(root)
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
