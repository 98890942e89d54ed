"""Distillation: what is kept of the unpruned model, and a run that learns from it."""

import errno
import fcntl
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file

from lpdeploy.config import PruneConfig
from lpdeploy.data.batches import IGNORED, list_batch
from lpdeploy.errors import ArtifactError, DiskFullError, LpdeployError
from lpdeploy.folders import lock_folder
from lpdeploy.models.loading import load_config, load_model
from lpdeploy.pruning import distillation
from lpdeploy.pruning.distillation import prepare_teacher
from lpdeploy.pruning.memory import plan_memory
from lpdeploy.pruning.ranks import Ranks
from lpdeploy.pruning.setup import load_dataset, load_source
from lpdeploy.pruning.teacher import list_training_rows
from tests.helpers import make_tiny_model
from tests.pruning.test_resume import make_pairs
from tests.pruning.test_run import OPTIONS, StoppedError, load_log, run, stop_after

DISTILL = {"distill": 0.5, "distill_top_k": 8, "lora_dropout": 0.0}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LPDEPLOY_CACHE", str(tmp_path / "cache"))


def prepare(base, data, **changes):
    options = PruneConfig(**{**OPTIONS, **DISTILL, **changes})
    source = load_source(str(base), options)
    dataset = load_dataset(source, str(data), options)
    return prepare_teacher(source, dataset, options, Ranks(), base_sha256="x"), dataset, options


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["text", "pairs"])
def test_it_keeps_what_the_unpruned_model_expects(base, data, tmp_path, kind, temperature):
    text = make_pairs(tmp_path / "pairs.json") if kind == "pairs" else data
    cache, dataset, options = prepare(
        base, text, distill_temperature=temperature, seq_len=24 if kind == "text" else 64
    )
    rows = list_training_rows(dataset, steps=1, batch_size=4, seed=options.seed)
    found, batch = cache.load(rows), dataset.collate(rows)
    assert found.weight == 0.5
    assert found.temperature == temperature
    model = load_model(base)
    for place, row in enumerate(rows):  # each row by itself, without padding
        length = int(dataset.lengths[row])
        with torch.no_grad():
            logits = model(batch["input_ids"][place : place + 1, :length]).logits[0]
        logs = (logits / temperature).log_softmax(-1)
        expected, ids = logs.topk(8)
        named = logs.gather(-1, found.ids[place, :length])
        torch.testing.assert_close(named, expected, rtol=1e-4, atol=1e-4)
        others = logs.exp().scatter(-1, ids, 0.0).sum(-1, keepdim=True).log()
        kept = found.log_probs[place, :length].float()
        torch.testing.assert_close(kept, torch.cat([expected, others], -1), rtol=2e-3, atol=2e-3)


def test_rows_of_the_training_are_kept_and_no_others(base, data):
    cache, dataset, options = prepare(base, data, steps=2)
    seen = {
        row
        for step in range(2)
        for row in list_batch(len(dataset), step=step, batch_size=4, seed=options.seed)
    }
    assert set(list_training_rows(dataset, steps=2, batch_size=4, seed=options.seed)) == seen
    assert set(cache.list_missing(range(len(dataset)))) == set(range(len(dataset))) - seen
    with pytest.raises(ArtifactError, match="lacks what the unpruned model expects in row"):
        cache.load([next(row for row in range(len(dataset)) if row not in seen)])


def test_a_second_run_waits_for_one_that_fills_the_cache(base, data, monkeypatch):
    first, _, _ = prepare(base, data)
    expected = (first.folder / "tokens").read_bytes()
    (first.folder / "checks").unlink()
    with ThreadPoolExecutor() as pool:
        with lock_folder(first.folder, fcntl.LOCK_EX):
            second = pool.submit(prepare, base, data)
            with pytest.raises(TimeoutError):
                second.result(timeout=1.0)
            assert not (first.folder / "checks").exists()
        second.result()
    assert (first.folder / "tokens").read_bytes() == expected


def test_ranks_agree_on_the_rows_that_are_missing(base, data):
    cache, _, _ = prepare(base, data)

    class Second(Ranks):
        def copy_first(self, tensors):
            tensors[0].copy_(torch.tensor([1, 0, 1]))

    rows = list(range(3))
    assert distillation._list_missing(cache, rows, Second(rank=1, size=2)) == [0, 2]
    assert distillation._list_missing(cache, rows, Ranks()) == cache.list_missing(rows)


def test_a_second_run_does_not_need_the_unpruned_model_again(base, data, monkeypatch):
    first, _, _ = prepare(base, data)
    monkeypatch.setattr(distillation, "load_model", lambda *_, **__: 1 / 0)
    again, _, _ = prepare(base, data)
    assert again.folder == first.folder
    with pytest.raises(ZeroDivisionError):  # another temperature is another cache
        prepare(base, data, distill_temperature=2.0)


def test_a_pass_that_was_stopped_goes_on(base, data, monkeypatch):
    passed = []
    save = distillation.TeacherCache.save

    def save_three(cache, row, *found):
        if len(passed) == 3:
            raise KeyboardInterrupt
        passed.append(row)
        save(cache, row, *found)

    monkeypatch.setattr(distillation.TeacherCache, "save", save_three)
    with pytest.raises(KeyboardInterrupt):
        prepare(base, data)
    written = []
    monkeypatch.setattr(
        distillation.TeacherCache, "save", lambda *given: (written.append(given[1]), save(*given))
    )
    cache, dataset, options = prepare(base, data)
    rows = list_training_rows(dataset, steps=8, batch_size=4, seed=options.seed)
    assert set(written) == set(rows) - set(passed)
    assert cache.list_missing(rows) == []


@pytest.mark.parametrize("name", ["tokens", "checks"])
def test_a_damaged_cache_is_refused(base, data, name):
    cache, _, _ = prepare(base, data)
    row = next(row for row in range(100) if not cache.list_missing([row]))
    path = cache.folder / name
    content = bytearray(path.read_bytes())
    place = cache._find(row) if name == "tokens" else 4 * row
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=f"in row {row}, or was damaged. Delete that folder"):
        cache.load([row])


def test_a_full_disk_is_said(base, data, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("lpdeploy.pruning.teacher.os.pwrite", refuse)
    with pytest.raises(DiskFullError, match="no space left"):
        prepare(base, data)


def test_before_anything_is_pruned_there_is_nothing_to_learn(base, data, tmp_path):
    """With B = 0 the model is its own teacher: the divergence is what float16 rounds."""
    options = {**DISTILL, "distill": 1.0, "distill_top_k": 1000, "prune_every": 8}
    run(base, tmp_path / "run", data, options=options)
    losses = [line["loss"] for line in load_log(tmp_path / "run")]
    assert abs(losses[0]) < 1e-3
    plain = run(base, tmp_path / "plain", data, options={"prune_every": 8})
    assert plain.loss > 1


def test_the_first_step_has_the_mixed_loss(base, data, tmp_path):
    losses = {}
    for weight in (0.0, 0.25, 1.0):
        options = {**DISTILL, "distill": weight} if weight else {"lora_dropout": 0.0}
        run(base, tmp_path / str(weight), data, options={**options, "steps": 1})
        losses[weight] = load_log(tmp_path / str(weight))[0]["loss"]
    mixed = 0.75 * losses[0.0] + 0.25 * losses[1.0]
    assert losses[0.25] == pytest.approx(mixed, rel=1e-5)


def test_it_brings_a_pruned_model_nearer_to_the_unpruned_one(base, data, tmp_path):
    from lpdeploy.models.compact import compact

    cache, dataset, _ = prepare(base, data)
    del cache
    rows = dataset.collate([0, 1, 2, 3])
    real = rows["labels"] != IGNORED
    expected = load_model(base)(rows["input_ids"]).logits.log_softmax(-1)[real]
    divergence = {}
    for weight in (0.0, 1.0):
        options = {"lora_dropout": 0.0, "steps": 40, "ratio": 0.3}
        options |= {"distill": weight, "distill_top_k": 40} if weight else {}
        run(base, tmp_path / str(weight), data, options=options)
        compact(tmp_path / str(weight))
        with torch.no_grad():
            own = load_model(tmp_path / str(weight) / "model")(rows["input_ids"]).logits
        divergence[weight] = torch.nn.functional.kl_div(
            own.log_softmax(-1)[real], expected, reduction="batchmean", log_target=True
        ).item()
    assert divergence[1.0] < divergence[0.0]


def test_a_resumed_run_is_the_same_to_the_bit(base, data, tmp_path):
    options = {**DISTILL, "refit": True, "lora_dropout": 0.1}
    run(base, tmp_path / "whole", data, options=options)
    with pytest.raises(StoppedError):
        run(base, tmp_path / "run", data, options=options, on_step=stop_after(5))
    shutil.rmtree(tmp_path / "cache")  # it is made again where it is gone
    run(base, tmp_path / "run", data, options=options, resume=True)
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


class TestLive:
    @pytest.mark.parametrize("temperature", [1.0, 2.0])
    def test_it_tells_what_the_cache_holds(self, base, tmp_path, temperature):
        text = make_pairs(tmp_path / "pairs.json")  # rows of several lengths
        own = {"distill_temperature": temperature, "seq_len": 64}
        cache, dataset, options = prepare(base, text, **own)
        live, _, _ = prepare(base, text, **own, distill_live=True)
        rows = list_training_rows(dataset, steps=1, batch_size=4, seed=options.seed)
        micro = {**dataset.collate(rows), "rows": torch.tensor(rows)}
        told, kept = live.teach(micro), cache.teach(micro)
        real = micro["attention_mask"].bool()
        assert (told.weight, told.temperature) == (kept.weight, kept.temperature)
        torch.testing.assert_close(
            told.log_probs[real], kept.log_probs[real].float(), rtol=2e-3, atol=2e-3
        )
        assert (told.ids[real] == kept.ids[real]).float().mean() > 0.99  # ties

    def test_a_run_learns_what_one_with_the_cache_learns(self, base, data, tmp_path):
        for name, live in (("cache", False), ("live", True)):
            run(base, tmp_path / name, data, options={**DISTILL, "distill_live": live})
        losses = [[line["loss"] for line in load_log(tmp_path / n)] for n in ("cache", "live")]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)

    @pytest.mark.parametrize("live", [False, True])
    def test_it_may_tell_every_token(self, base, data, tmp_path, live):
        options = {**DISTILL, "distill_top_k": 10_000, "distill_live": live}
        run(base, tmp_path / "run", data, options=options)
        assert all(line["loss"] < 10 for line in load_log(tmp_path / "run"))

    def test_it_leaves_nothing_on_disk(self, base, data, tmp_path):
        run(base, tmp_path / "run", data, options={**DISTILL, "distill_live": True})
        assert not list((tmp_path / "cache").glob("teachers/*"))

    def test_a_resumed_run_is_the_same_to_the_bit(self, base, data, tmp_path):
        options = {**DISTILL, "distill_live": True}
        run(base, tmp_path / "whole", data, options=options)
        with pytest.raises(StoppedError):
            run(base, tmp_path / "run", data, options=options, on_step=stop_after(4))
        run(base, tmp_path / "run", data, options=options, resume=True)
        weights = "adapter/adapter_model.safetensors"
        assert (tmp_path / "run" / weights).read_bytes() == (
            tmp_path / "whole" / weights
        ).read_bytes()

    def test_the_memory_that_is_planned_has_room_for_it(self, base):
        config = load_config(base)
        plans = [
            plan_memory(
                config, PruneConfig(distill=0.5, distill_live=live), dtype="fp32", device="cpu"
            )
            for live in (False, True)
        ]
        assert plans[1].weights == 2 * plans[0].weights


def test_only_the_answers_of_instructions_are_learnt(base, tmp_path):
    pairs = make_pairs(tmp_path / "pairs.json")
    rows = json.loads(pairs.read_text())
    (tmp_path / "other.json").write_text(
        json.dumps([{**row, "output": row["output"]} for row in rows])
    )
    options = {**DISTILL, "distill": 1.0, "seq_len": 64, "steps": 2}
    run(base, tmp_path / "run", pairs, options=options)
    run(base, tmp_path / "all", pairs, options={**options, "train_on_prompt": True})
    one, two = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        for name in ("run", "all")
    )
    assert any(not torch.equal(tensor, two[key]) for key, tensor in one.items())


def test_a_large_vocabulary_takes_ids_of_four_bytes(data, tmp_path):
    base = make_tiny_model(tmp_path / "wide", vocab_size=(1 << 16) + 8)
    cache, _, _ = prepare(base, data, steps=1, batch_size=2)
    assert cache.bytes_a_token == 8 * (2 + 4) + 2
    narrow = make_tiny_model(tmp_path / "narrow")
    cache, _, _ = prepare(narrow, data, steps=1, batch_size=2)
    assert cache.bytes_a_token == 8 * (2 + 2) + 2


def test_too_few_rows_for_a_refit_are_refused_before_the_pass(base, tmp_path, monkeypatch):
    monkeypatch.setattr(distillation, "load_model", lambda *_, **__: 1 / 0)
    (tmp_path / "text.txt").write_text("w1 w2 w3 " * 10)
    with pytest.raises(LpdeployError, match="would only fit these tokens"):
        run(base, tmp_path / "run", tmp_path / "text.txt", options={**DISTILL, "refit": True})


def test_options_that_cannot_go_with_it_are_refused():
    with pytest.raises(ValueError, match="`schedule='one-shot'` has none"):
        PruneConfig(distill=0.5, schedule="one-shot")
    with pytest.raises(ValueError, match="`distill` runs the whole unpruned model on one device"):
        PruneConfig(distill=0.5, shard=True)
    with pytest.raises(ValueError, match="`distill_top_k` belongs to `distill`; give that too"):
        PruneConfig(distill_top_k=3)
