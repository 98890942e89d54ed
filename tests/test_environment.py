"""What the environment says about other processes."""

import pytest

from lpdeploy.environment import count_ranks
from lpdeploy.errors import LpdeployError

LAUNCHED = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "n1",
            "MASTER_PORT": "29500"}  # fmt: skip


def set_all(monkeypatch, variables):
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "ranks"),
    [({}, 1), ({"WORLD_SIZE": "1"}, 1), ({"RANK": "0"}, 1), (LAUNCHED, 4)],
)
def test_a_launcher_says_how_many_ranks_there_are(monkeypatch, variables, ranks):
    set_all(monkeypatch, variables)
    assert count_ranks() == ranks


@pytest.mark.parametrize("missing", [name for name in LAUNCHED if name != "WORLD_SIZE"])
def test_every_variable_of_a_launcher_is_needed(monkeypatch, missing):
    for value in (None, ""):
        own = {name: text for name, text in LAUNCHED.items() if name != missing}
        set_all(monkeypatch, own if value is None else {**own, missing: value})
        with pytest.raises(LpdeployError, match=f"has no {missing}.* unset WORLD_SIZE"):
            count_ranks()


@pytest.mark.parametrize("name", [name for name in LAUNCHED if name != "MASTER_ADDR"])
@pytest.mark.parametrize("value", ["x", "-1", "1.5"])
def test_numbers_of_a_launcher_are_checked(monkeypatch, name, value):
    set_all(monkeypatch, {**LAUNCHED, name: value})
    with pytest.raises(LpdeployError, match=f"{name} is '{value}', which is no whole number"):
        count_ranks()


@pytest.mark.parametrize("variables", [{"RANK": "4"}, {"RANK": "9" * 20}, {"WORLD_SIZE": "0"}])
def test_a_rank_is_one_of_all(monkeypatch, variables):
    set_all(monkeypatch, {**LAUNCHED, **variables})
    with pytest.raises(LpdeployError, match="RANK is .* of WORLD_SIZE"):
        count_ranks()
