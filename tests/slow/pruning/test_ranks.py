"""Two ranks give what one process gives, and refuse to differ.

Ranks are real processes that torchrun starts, over gloo on the loopback. Starting one takes
seconds, so all comparisons share one launch: ``rank_worker`` runs, and the tests here look.
"""

import json
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed as dist

from lpdeploy.config import PruneConfig
from lpdeploy.errors import LpdeployError, RankLostError
from lpdeploy.models.compact import compact
from lpdeploy.models.loading import load_config
from lpdeploy.pruning.ranks import Ranks, join_ranks
from lpdeploy.pruning.travel import compute_travel
from lpdeploy.run_folder import RunFolder
from tests.helpers import list_names, make_text, make_tiny_model
from tests.slow.pruning import rank_worker
from tests.slow.pruning.launching import TORCHRUN, finish, start
from tests.slow.pruning.rank_worker import CASES


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Runs of two ranks, ``two/NAME``, beside those of one process, ``one/NAME``."""
    folder = tmp_path_factory.mktemp("ranks")
    make_tiny_model(folder / "mha", heads=4)
    make_tiny_model(folder / "gqa", heads=4, kv_heads=2)
    make_tiny_model(
        folder / "odd", model_type="qwen2", heads=4, kv_heads=2, intermediate_size=49,
        tie_word_embeddings=True,
    )  # fmt: skip
    make_unusable(folder)
    make_text(folder / "text.txt")
    make_pairs(folder / "pairs.jsonl")
    launched = start(TORCHRUN, "tests.slow.pruning.rank_worker", folder, stderr=subprocess.PIPE)
    rank_worker.run_alone(folder)
    _, errors = finish(launched)
    assert launched.returncode == 0, errors
    return folder


def make_unusable(folder):
    """Save models of which a weight is missing, has another shape, or cannot be read."""
    for name in ("lacking", "misshapen", "damaged"):
        make_tiny_model(folder / name, heads=4)
        file = folder / name / "model.safetensors"
        tensors = load_file(file)
        weight = tensors.pop("model.layers.1.mlp.up_proj.weight")
        if name == "misshapen":
            tensors["model.layers.1.mlp.up_proj.weight"] = weight[:-1].clone()
        save_file(tensors, file)
    (folder / "damaged" / "model.safetensors").write_bytes(file.read_bytes()[:500])


def make_pairs(path):
    lines = [
        {
            "instruction": " ".join(f"w{(3 * row + word) % 50}" for word in range(1 + row % 5)),
            "response": " ".join(f"w{(row + 7 * word) % 60}" for word in range(2 + row % 9)),
        }
        for row in range(60)
    ]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_do_what_one_process_does(root, name):
    one, two = root / "one" / name, root / "two" / name
    plans = [json.loads((run / "plan.json").read_text()) for run in (one, two)]
    assert plans[0]["kept"] == plans[1]["kept"]
    expected, actual = (load_file(r / "adapter" / "adapter_model.safetensors") for r in (one, two))
    assert expected.keys() == actual.keys()
    for key, tensor in expected.items():
        # The same sums of the same float32 numbers in another order, through 6 steps of AdamW,
        # whose division by the root of a small second moment amplifies their noise. The largest
        # weight is about 0.2, a step of the learning rate 0.01.
        torch.testing.assert_close(actual[key], tensor, rtol=1e-3, atol=2e-5)
    scores = [load_file(run / "importance.safetensors") for run in (one, two)]
    for key, tensor in scores[0].items():
        atol = 1e-4 * tensor.max().item()
        torch.testing.assert_close(scores[1][key], tensor, rtol=1e-3, atol=atol)
    losses = [
        [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]
        for run in (one, two)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("name", ["gqa-refit", "gqa-shard-gate"])
def test_ranks_try_learning_rates_together(root, name):
    alone = rank_worker.choose_rates(root, name, shard=False)
    for answers in read_answers(root):
        rates = {float(lr): loss for lr, loss in answers["rates"][name].items()}
        assert rates == pytest.approx(alone, rel=1e-4)


def test_what_two_ranks_wrote_is_compacted_as_always(root):
    for name in ("gqa-lora-mask", "gqa-shard-gate"):
        compact(root / "one" / name)
        compact(root / "two" / name)
        one, two = (
            load_file(root / n / name / "model" / "model.safetensors") for n in ("one", "two")
        )
        for key, tensor in one.items():
            torch.testing.assert_close(two[key], tensor, rtol=1e-3, atol=2e-5)  # as above


@pytest.mark.parametrize("name", rank_worker.COUNTED)
def test_what_travels_is_what_is_counted_from_shapes(root, name):
    """Two layers, hidden 32, 4 heads of 8, 48 channels, rank 8; all by hand."""
    key = 32 if name.startswith("mha") else 16
    shapes = [(32, 32), (key, 32), (key, 32), (32, 32), (48, 32), (48, 32), (32, 48)]
    weights = sum(out * columns for out, columns in shapes)
    groups = key // 8 + 48
    lora = 4 * (2 * 8 * sum(out + columns for out, columns in shapes) + 1)
    model, _, options = CASES[name]
    chosen = PruneConfig(**{**rank_worker.OPTIONS, **options, "ratio": rank_worker.KEEPS_ALL})
    travel = compute_travel(load_config(root / model), chosen, ranks=2, itemsize=4)
    assert travel.gradients == lora
    numbers = {"gradient": weights, "wanda": 6 * 32 + 48, "gate": groups, "lora": 0}
    scores = 4 * 2 * numbers[chosen.criterion] + 4 * 2 * (4 * (key // 8) + 3 * 48) * chosen.shard
    assert travel.scores == scores
    layer = 4 * (weights + 2 * 32)
    # Eight rows are two micro-batches for each rank, there and back through two layers.
    assert travel.weights == (2 * 2 * 2 * layer if chosen.shard else 0)
    counted = read_answers(root)[0]["messages"][name]
    last = 4  # event of those every 2 steps, in 90 % of 6; the steps after it score no more
    assert counted["summed"].count(lora) == 6
    # Around each of the two events, the loss and the number of its tokens are summed in float64.
    assert counted["summed"].count(16) == 2 * 2
    observed = [size for size in counted["summed"] if size not in (lora, 8, 16, 256)]
    assert sum(observed) == last * scores
    # The held-out rows are four micro-batches a rank, through two layers, twice an event. In the
    # backward pass that follows, FSDP still knows their order, and fetches one layer in vain.
    events = 2 * (2 * 2 * 4 + 1)
    assert counted["gathered"] == [layer] * (6 * 8 + events if chosen.shard else 0)


def read_answers(root):
    return [json.loads((root / f"answers-{rank}.json").read_text()) for rank in range(2)]


def test_a_rank_holds_its_rows_of_the_layers_alone(root):
    first, second = (answers["own_rows"] for answers in read_answers(root))
    prefix = "model.layers.1"
    for name, counts in {
        f"{prefix}.mlp.up_proj.weight": (25, 24),
        f"{prefix}.mlp.down_proj.weight": (16, 16),
        f"{prefix}.self_attn.q_proj.bias": (16, 16),
        "model.embed_tokens.weight": (72, 72),
        "model.norm.weight": (32, 32),
    }.items():
        assert (first[name], second[name]) == counts


def test_a_checkpoint_that_cannot_be_divided_is_refused(root):
    for answers in read_answers(root):
        refused = answers["unusable"]
        for name in ("lacking", "misshapen"):
            assert "lacks 1 weights of its architecture" in refused[name]
            assert "first model.layers.1.mlp.up_proj.weight." in refused[name]
        assert "damaged/model.safetensors' cannot be read" in refused["damaged"]
        assert refused["damaged"].endswith("Copy the checkpoint anew.")


def test_only_what_is_about_peers_becomes_a_lost_rank():
    with pytest.raises(RankLostError, match="Rank 0 of 2 lost another rank"), Ranks(0, 2).watch():
        raise dist.DistBackendError("NCCL error")
    for size, error in ((2, RuntimeError("out of memory")), (1, dist.DistBackendError("NCCL"))):
        with pytest.raises(RuntimeError) as caught, Ranks(0, size).watch():
            raise error
        assert caught.value is error


def test_a_rank_that_is_to_end_waits_for_no_one_for_long(monkeypatch):
    class Work:
        def is_completed(self):
            return False

    monkeypatch.setattr("lpdeploy.pruning.ranks.dist.all_reduce", lambda *_, **__: Work())
    monkeypatch.setattr("lpdeploy.pruning.ranks._PATIENCE_SECONDS", 0.01)
    ranks = Ranks(0, 2)
    ranks.stop.set()
    with pytest.raises(RankLostError, match="Rank 0 of 2 lost another rank"):
        ranks.sum([torch.ones(2)])


def test_ranks_that_differ_try_no_rates(root):
    for answers in read_answers(root):
        assert "Rank 1 of 2 differs from rank 0: it has other options" in answers["rate_options"]


def test_ranks_that_differ_do_not_go_on(root):
    for answers in read_answers(root):
        assert answers["options"].startswith(
            "Rank 1 of 2 differs from rank 0: it has other options"
        )
        assert "Give every rank the same command" in answers["options"]
        assert answers["groups"].startswith(
            "Rank 1 of 2 differs from rank 0: it removed other groups at step 2."
        )
    # Nothing of what they disagree about was kept.
    assert list_names(root / "two" / "groups") == [
        "log.jsonl", "recipe.yaml",
    ]  # fmt: skip


def test_a_loss_that_is_not_finite_ends_all_ranks_and_one_keeps_the_state(root):
    first, second = (answers["infinite"] for answers in read_answers(root))
    assert "is kept in" in first
    assert "Lower `lr` (it was 1e+30) and go on with `resume=True`." in first
    assert second == "silent"
    assert RunFolder(root / "two" / "infinite").checkpoint.is_file()


def test_ranks_of_which_one_is_told_to_end_all_do_after_the_same_step(root):
    first, second = (answers["ended"] for answers in read_answers(root))
    path = root / "two" / "ended"
    kept = RunFolder(path).checkpoint
    assert first == (
        f"The run was told to end. The state after step 3 is kept in '{kept}'. "
        "Go on with `resume=True`."
    )
    assert second == "silent"
    assert (path / "log.jsonl").read_text().count("\n") == 3


def test_a_batch_that_cannot_be_dealt_is_refused(root):
    for answers in read_answers(root):
        assert answers["refused"] == (
            "`batch_size` 8 cannot be dealt evenly over 2 ranks in micro-batches of 8. "
            "Choose a multiple of 16, or another `micro_batch_size`."
        )


def test_one_process_alone_cannot_shard():
    with pytest.raises(LpdeployError, match="`shard=True` spreads the base over several ranks"):
        join_ranks(PruneConfig(shard=True, removal="mask", device="cpu"))


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_an_accelerate_that_would_wrap_the_model_is_refused(monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(LpdeployError, match=f"configured for {name}.* launch --multi_gpu"):
        join_ranks(PruneConfig(device="cpu"))


def test_micro_batches_are_dealt_in_turn_and_evenly():
    def make(index):
        ids = torch.full((1, 2), index)
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}

    dealt = [Ranks(rank, 3).deal([make(index) for index in range(4)]) for rank in range(3)]
    assert [[int(m["labels"][0, 0]) for m in own] for own in dealt] == [
        [0, 3],
        [1, -100],
        [2, -100],
    ]
    for own in dealt[1:]:
        assert not own[1]["attention_mask"].any()
    assert all(own[0]["attention_mask"].all() for own in dealt)


def test_a_rank_that_hangs_ends_the_wait(root):
    assert read_answers(root)[0]["hanging"] == (
        "Rank 0 of 2 lost another rank, which was killed or has failed."
    )
