"""Kept tokens: the same rows, mapped, and never those of anything else."""

import json
import multiprocessing
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lpdeploy.data.batches import TokenDataset, build_token_dataset
from lpdeploy.data.cache import find_cache, load_or_build
from lpdeploy.data.rows import ASSISTANT, USER, Example, Message
from lpdeploy.data.sources import Corpus

IDENTITY = {"text": "a hash", "seq_len": 5}
ARRAYS = ("tokens", "labelled", "offsets")


def make_dataset(seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 9, size=50)
    return TokenDataset(
        tokens=rng.integers(0, 1000, size=lengths.sum(), dtype=np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        labelled=rng.random(lengths.sum()) < 0.5,
        num_dropped=3,
        num_cut=2,
        chat_template="{{ messages }}",
    )


def assert_same(dataset, expected):
    for name in ARRAYS:
        array = getattr(dataset, name)
        assert array.dtype == getattr(expected, name).dtype
        assert array.tolist() == getattr(expected, name).tolist()
    assert dataset.num_dropped == expected.num_dropped
    assert dataset.num_cut == expected.num_cut
    assert dataset.chat_template == expected.chat_template


def refuse():
    raise AssertionError("this was to come from the cache")


def get_file(folder):
    (path,) = (folder / "tokens").iterdir()
    return path


def test_what_was_kept_comes_back(tmp_path, told):
    first = load_or_build(tmp_path, IDENTITY, build=make_dataset)
    assert_same(first, make_dataset())
    assert told == []
    again = load_or_build(tmp_path, IDENTITY, build=refuse)
    assert_same(again, make_dataset())
    assert again.sha256 == make_dataset().sha256
    assert told == [f"Using the cached tokens of 50 rows in '{get_file(tmp_path)}'."]


def test_rows_of_a_tokenizer_come_back(tmp_path, tokenizer):
    turns = [("say cat", "the cat sat"), ("say dog", "dog")]
    examples = [Example(messages=(Message(USER, q), Message(ASSISTANT, a))) for q, a in turns]
    built = build_token_dataset(Corpus("pairs", examples), tokenizer, seq_len=512)
    load_or_build(tmp_path, IDENTITY, build=lambda: built)
    kept = load_or_build(tmp_path, IDENTITY, build=refuse)
    expected, found = built.collate([1, 0]), kept.collate([1, 0])
    assert {name: t.tolist() for name, t in found.items()} == {
        name: t.tolist() for name, t in expected.items()
    }


@pytest.mark.skipif(sys.platform != "linux", reason="mappings are read from /proc")
def test_rows_are_mapped_and_cannot_be_written(tmp_path):
    for build in (make_dataset, refuse):
        dataset = load_or_build(tmp_path, IDENTITY, build=build)
        assert str(get_file(tmp_path)) in Path("/proc/self/maps").read_text()
        for name in ARRAYS:
            with pytest.raises(ValueError, match="read-only"):
                getattr(dataset, name)[0] = 1
        del dataset
        assert str(get_file(tmp_path)) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("change", [{"seq_len": 6}, {"text": "another"}, {"new": None}])
def test_anything_else_is_made_anew(tmp_path, change):
    load_or_build(tmp_path, IDENTITY, build=make_dataset)
    other = load_or_build(tmp_path, IDENTITY | change, build=lambda: make_dataset(1))
    assert_same(other, make_dataset(1))
    assert len(list((tmp_path / "tokens").iterdir())) == 2


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-8])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def replace_by_text(path):
    path.write_text("not a safetensors file")


def replace_by_another_model(path):
    save_file({"weight": np.ones(3)}, path)


def drop_its_metadata(path):
    save_file(load_file(path), path)


def take_that_of_another_source(path):
    other = path.parent / "other"
    load_or_build(other, IDENTITY | {"text": "another"}, build=lambda: make_dataset(1))
    get_file(other).replace(path)
    (other / "tokens").rmdir()
    other.rmdir()


@pytest.mark.parametrize(
    "damage",
    [cut_short, flip_a_bit, replace_by_text, replace_by_another_model, drop_its_metadata,
     take_that_of_another_source],
)  # fmt: skip
def test_a_damaged_file_is_made_anew_with_a_word(tmp_path, told, damage):
    load_or_build(tmp_path, IDENTITY, build=make_dataset)
    damage(get_file(tmp_path))
    dataset = load_or_build(tmp_path, IDENTITY, build=make_dataset)
    assert_same(dataset, make_dataset())
    (sentence,) = told
    assert sentence.startswith(f"'{get_file(tmp_path)}' is damaged or not of lpdeploy (")
    assert sentence.endswith("): tokenizing anew.")
    assert_same(load_or_build(tmp_path, IDENTITY, build=refuse), make_dataset())


def test_where_nothing_can_be_kept_the_run_goes_on(tmp_path, told):
    (tmp_path / "tokens").write_text("a file where the folder should be")
    dataset = load_or_build(tmp_path, IDENTITY, build=make_dataset)
    assert_same(dataset, make_dataset())
    (sentence,) = told
    assert f"cannot be kept in '{tmp_path / 'tokens'}'" in sentence


def test_leftovers_of_killed_processes_go(tmp_path):
    load_or_build(tmp_path, IDENTITY, build=make_dataset)
    path = get_file(tmp_path)
    dead = multiprocessing.get_context("spawn").Process(target=int)
    dead.start()
    dead.join()
    path.with_name(f".{path.name}.tmp-{dead.pid}").write_text("half")
    path.unlink()
    load_or_build(tmp_path, IDENTITY, build=make_dataset)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def _keep_often(folder, times):
    for _ in range(times):
        for path in (folder / "tokens").glob("*.safetensors"):
            path.unlink(missing_ok=True)  # so that all of them write, again and again
        assert_same(load_or_build(folder, IDENTITY, build=make_dataset), make_dataset())


def test_processes_may_keep_the_same_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_keep_often, args=(tmp_path, 30)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert_same(load_or_build(tmp_path, IDENTITY, build=make_dataset), make_dataset())


def test_the_cache_is_where_users_keep_theirs(monkeypatch, tmp_path):
    monkeypatch.setenv("LPDEPLOY_CACHE", "~/elsewhere")
    assert find_cache() == Path.home() / "elsewhere"
    monkeypatch.setenv("LPDEPLOY_CACHE", "")
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    assert find_cache() == tmp_path / "lpdeploy"


def test_the_hash_of_rows_is_computed_once(monkeypatch):
    dataset = make_dataset()
    first = dataset.sha256
    monkeypatch.setattr("hashlib.sha256", refuse)
    assert dataset.sha256 == first


def test_kept_files_say_what_they_are(tmp_path):
    load_or_build(tmp_path, IDENTITY, build=make_dataset)
    with safe_open(get_file(tmp_path), framework="np") as file:
        metadata = file.metadata()
    assert json.loads(metadata["identity"]) == IDENTITY | {"rows_version": 3}
    assert metadata["sha256"] == make_dataset().sha256
