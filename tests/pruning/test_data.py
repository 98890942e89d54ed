"""What a run is fed: tokens of earlier runs, how they are counted, what is said of padding."""

import json

import pytest

from lpdeploy.data.cache import find_cache
from tests.pruning.test_run import load_log, run

FEW = {"steps": 2, "checkpoint_every": 0}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("LPDEPLOY_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def pairs(tmp_path):
    rows = [
        {"instruction": "w1 " * (1 + number % 3), "output": "w2 " * (1 + number % 7)}
        for number in range(40)
    ]
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(rows))
    return path


def list_cached():
    return sorted(path.name for path in find_cache().rglob("*.safetensors"))


def read_result(folder):
    names = ("adapter/adapter_model.safetensors", "plan.json")
    return [(folder / name).read_bytes() for name in names]


def test_a_second_run_tokenizes_nothing(base, data, tmp_path, told):
    first, second = [], []
    run(base, tmp_path / "one", data, options=FEW,
        on_tokenize=lambda *now: first.append(now))  # fmt: skip
    assert first == [(40, 40)]
    assert not any("Using the cached tokens" in line for line in told)
    run(base, tmp_path / "two", data, options=FEW,
        on_tokenize=lambda *now: second.append(now))  # fmt: skip
    assert second == []
    assert sum("Using the cached tokens" in line for line in told) == 1
    run(base, tmp_path / "three", data, options=FEW, cache=False)
    assert read_result(tmp_path / "one") == read_result(tmp_path / "two")
    assert read_result(tmp_path / "one") == read_result(tmp_path / "three")
    assert len(list_cached()) == 1


def test_without_a_cache_nothing_is_kept(base, data, tmp_path):
    run(base, tmp_path / "run", data, options=FEW, cache=False)
    assert list_cached() == []


def test_all_that_makes_rows_makes_another_file(base, pairs, tmp_path):
    options = FEW | {"seq_len": 80}
    run(base, tmp_path / "a", pairs, options=options)
    run(base, tmp_path / "b", pairs, options=options | {"train_on_prompt": True})
    run(base, tmp_path / "c", pairs, options=options | {"seq_len": 90})
    # The same tokens under other numbers: nothing but the tokenizer's file has changed.
    path = base / "tokenizer.json"
    path.write_text(path.read_text().replace('"w1"', '"w1 "'))
    run(base, tmp_path / "d", pairs, options=options)
    pairs.write_text(pairs.read_text().replace("w2", "w3"))
    run(base, tmp_path / "e", pairs, options=options)
    assert len(list_cached()) == 5


def test_the_share_of_padding_is_shown(base, pairs, tmp_path, told):
    run(base, tmp_path / "run", pairs, options=FEW | {"seq_len": 80})
    (line,) = [line for line in told if "rows of at most" in line]
    log = [step for step in load_log(tmp_path / "run") if step["step"]]
    # Of these two steps of four rows, as of the whole run.
    computed = sum(step["tokens_per_s"] * step["seconds"] for step in log)
    padded = sum(step["tokens_per_s"] * step["seconds"] * step["padding"] for step in log)
    assert padded > 0
    assert f"padding {padded / computed:.1%} of what is computed" in line


def test_packed_text_is_shown_without_padding(base, data, tmp_path, told):
    run(base, tmp_path / "run", data, options=FEW)
    assert any("rows of at most" in line for line in told)
    assert not any("padding" in line for line in told)
