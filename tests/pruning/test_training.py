"""Algorithm 1 end to end on a tiny model: cutting equals masking, and the target is met."""

import numpy as np
import pytest
import torch

from lpdeploy.config import PruneConfig
from lpdeploy.criteria import CRITERIA
from lpdeploy.data.batches import TokenDataset, build_token_dataset, list_batch
from lpdeploy.data.sources import load_corpus
from lpdeploy.errors import NonFiniteError
from lpdeploy.families.groups import expand_index, list_group_specs
from lpdeploy.models.loading import load_tokenizer
from lpdeploy.pruning.scoring import ScoreForm, Scorer
from lpdeploy.pruning.state import PruningState
from lpdeploy.pruning.training import Training, _accumulate_gradients, count_steps, run_steps
from lpdeploy.pruning.walk import list_held_out
from tests.helpers import make_lora_model, make_text


def make_training(tmp_path, *, model=None, **options):
    defaults = {
        "ratio": 0.5, "steps": 12, "batch_size": 4, "micro_batch_size": 2, "seq_len": 24,
        "lr": 1e-2, "prune_every": 2, "ramp": "authors", "round_to": 4, "lora_dropout": 0.0,
    }  # fmt: skip
    chosen = PruneConfig(**{**defaults, **options})
    folder = tmp_path / f"model-{chosen.effective_removal}-{chosen.scope}"
    wrapped = make_lora_model(folder, dropout=chosen.lora_dropout, **(model or {}))
    causal_lm = wrapped.get_base_model()
    specs = list_group_specs(causal_lm.config)
    form = ScoreForm(absolute=chosen.score_form == "absolute", normalize=chosen.normalize)
    tokenizer = load_tokenizer(folder, causal_lm.config)
    corpus = load_corpus(str(make_text(tmp_path / "text.txt")))
    optimizer = torch.optim.AdamW(
        [p for p in wrapped.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0
    )
    return Training(
        model=wrapped,
        optimizer=optimizer,
        device=torch.device("cpu"),
        dtype=torch.float32,
        dataset=build_token_dataset(corpus, tokenizer, seq_len=chosen.seq_len),
        state=PruningState(
            model=causal_lm,
            specs=specs,
            scorer=Scorer(CRITERIA[chosen.criterion], causal_lm, specs, form=form),
            removal=chosen.effective_removal,
        ),
        options=chosen,
        steps=count_steps(chosen, 0),
    )


def named_lora(training):
    named = training.state.model.named_parameters()
    return {name: p.detach() for name, p in named if p.requires_grad}


MODELS = [
    {"heads": 4},
    {"heads": 4, "kv_heads": 2},
    {"model_type": "qwen2", "heads": 4, "kv_heads": 2},
    {"model_type": "qwen3", "heads": 4, "kv_heads": 2},
    {"model_type": "mistral", "heads": 4},
]


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.get("model_type", "llama"))
def test_cutting_trains_the_same_weights_as_masking(tmp_path, model, scope):
    cut = make_training(tmp_path, model=model, removal="cut", scope=scope)
    mask = make_training(tmp_path, model=model, removal="mask", scope=scope)
    losses = [(a.loss, b.loss) for a, b in zip(run_steps(cut), run_steps(mask), strict=True)]
    assert cut.state.kept.keys() == mask.state.kept.keys()
    for name, kept in cut.state.kept.items():
        assert kept.tolist() == mask.state.kept[name].tolist()
    # Same sums in another order, through 12 steps of AdamW, whose division by the root of a small
    # second moment amplifies float32 noise.
    for cut_loss, mask_loss in losses:
        assert cut_loss == pytest.approx(mask_loss, rel=1e-4)
    small, full = named_lora(cut), named_lora(mask)
    for spec in cut.state.specs:
        for piece in spec.slices:
            index = expand_index(cut.state.kept[spec.name], piece.block)
            for factor, dim in (("lora_A", 1), ("lora_B", 0)):
                name = f"{piece.module}.{factor}.default.weight"
                expected = full[name].index_select(dim, index) if dim == piece.dim else full[name]
                torch.testing.assert_close(small[name], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_selects_the_same_cut_or_masked(tmp_path, criterion, normalize):
    # Few steps and a small rate, so that float32 noise cannot grow until it decides a near tie.
    options = {"criterion": criterion, "normalize": normalize, "steps": 6, "lr": 1e-3}
    cut = make_training(tmp_path, removal="cut", **options)
    mask = make_training(tmp_path, removal="mask", **options)
    list(run_steps(cut))
    list(run_steps(mask))
    for name, kept in cut.state.kept.items():
        assert kept.tolist() == mask.state.kept[name].tolist()
        assert cut.state.average[name].shape == mask.state.average[name].shape == kept.shape


def test_the_target_is_met_and_widths_shrink(tmp_path):
    training = make_training(tmp_path, ratio=0.5)
    infos = list(run_steps(training))
    assert infos[-1].ratio == 0.5
    assert sum(info.removed for info in infos) == len(training.schedule.list_events())
    attention = training.state.model.model.layers[0].self_attn
    mlp = training.state.model.model.layers[0].mlp
    assert attention.q_proj.base_layer.weight.shape == (16, 32)
    assert attention.o_proj.lora_A["default"].weight.shape == (4, 16)
    assert mlp.down_proj.base_layer.weight.shape == (32, 24)
    assert mlp.up_proj.lora_B["default"].weight.shape == (24, 4)
    assert mlp.gate_proj.base_layer.out_features == mlp.gate_proj.out_features == 24


def test_optimizer_moments_are_cut_with_their_parameters(tmp_path):
    training = make_training(tmp_path)
    list(run_steps(training))
    trained = {id(p) for p in training.trainable}
    assert trained == {id(p) for p in named_lora_parameters(training)}
    for parameter in training.trainable:
        assert training.optimizer.state[parameter]["exp_avg"].shape == parameter.shape


def named_lora_parameters(training):
    return [p for p in training.state.model.parameters() if p.requires_grad]


def test_ratio_zero_removes_nothing(tmp_path):
    training = make_training(tmp_path, ratio=0.0)
    list(run_steps(training))
    for spec in training.state.specs:
        assert len(training.state.kept[spec.name]) == spec.num_groups


def test_the_gradient_does_not_depend_on_micro_batches(tmp_path):
    one = make_training(tmp_path, micro_batch_size=4, ratio=0.0, steps=3)
    two = make_training(tmp_path, micro_batch_size=1, ratio=0.0, steps=3)
    for training in (one, two):
        # In float32 the sums differ in the last bits, by the CPU's kernels; AdamW, which divides
        # a gradient by its own size, makes much of that where a gradient is nearly zero.
        training.model.double()
        list(run_steps(training))
    for name, parameter in named_lora(one).items():
        torch.testing.assert_close(parameter, named_lora(two)[name], rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_training_learns(tmp_path):
    infos = list(run_steps(make_training(tmp_path, steps=60, ratio=0.2, lr=3e-2)))
    losses = [info.loss for info in infos]
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.5  # nats a token


def test_a_nan_stops_before_it_reaches_weights_or_scores(tmp_path):
    training = make_training(tmp_path)
    steps = run_steps(training)
    next(steps)
    before = {name: p.clone() for name, p in named_lora(training).items()}
    scores = {name: s.clone() for name, s in training.state.average.items()}
    training.state.model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(NonFiniteError, match="loss became nan at step 2"):
        next(steps)
    for name, parameter in named_lora(training).items():
        assert torch.equal(parameter, before[name])
    for name, score in training.state.average.items():
        assert torch.equal(score, scores[name])


def test_an_infinite_gradient_stops_too(tmp_path):
    training = make_training(tmp_path)
    parameter = training.trainable[0]
    parameter.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(NonFiniteError, match="gradient norm became .* at step 1"):
        next(run_steps(training))


def test_steps_are_counted_from_epochs_unless_given():
    assert count_steps(PruneConfig(epochs=2, batch_size=8, micro_batch_size=4), 20) == 6
    assert count_steps(PruneConfig(steps=5), 20) == 5


@pytest.mark.parametrize("schedule", ["separate", "one-shot"])
def test_pruning_at_once_lands_on_the_target_without_training(tmp_path, schedule):
    options = {"schedule": schedule, "calibration_samples": 6, "removal": "mask"}
    training = make_training(tmp_path, **options)
    before = {name: p.clone() for name, p in named_lora(training).items()}
    steps = run_steps(training)
    info = next(steps)
    assert (info.step, info.removed, info.ratio, info.lr) == (0, True, 0.5, 0.0)
    for spec in training.state.specs:
        assert len(training.state.kept[spec.name]) == spec.num_groups // 2
    for name, parameter in named_lora(training).items():
        assert torch.equal(parameter, before[name])
    assert not training.optimizer.state
    assert all(p.grad is None for p in training.trainable)
    rest = list(steps)
    assert len(rest) == (12 if schedule == "separate" else 0)
    assert not any(info.removed or info.scoring_seconds for info in rest)
    assert all(info.ratio == 0.5 for info in rest)


def calibrate_by_hand(training, sizes):
    """Scores of each batch of the calibration, by the criterion alone; rows as step 1 has them."""
    rows = list_batch(len(training.dataset), step=0, batch_size=sum(sizes), seed=0)
    scorer, scores = training.state.scorer, []
    for size in sizes:
        batch = training.dataset.collate([rows.pop(0) for _ in range(size)])
        scorer.attention_mask = batch["attention_mask"]
        with scorer.observe():
            training.model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.backward()
        scores.append(scorer.compute_importance())
        training.optimizer.zero_grad()
    return scores


@pytest.mark.parametrize("criterion", ["lora", "gate", "gradient", "wanda"])
def test_calibration_takes_the_plain_mean_of_its_batches(tmp_path, criterion):
    options = {"criterion": criterion, "calibration_samples": 10}
    training = make_training(tmp_path, **options)
    next(run_steps(training))
    scores = calibrate_by_hand(make_training(tmp_path, **options), [4, 4, 2])
    for name, average in training.state.average.items():
        expected = sum(score[name].double() for score in scores) / 3
        # Micro-batches of two rows against whole batches: float32 sums in another order.
        torch.testing.assert_close(average.double(), expected, rtol=1e-3, atol=0)


def test_calibration_warms_up_the_average_of_a_joint_run(tmp_path):
    warm = make_training(tmp_path, calibration_samples=32, prune_every=4)
    cold = make_training(tmp_path, prune_every=4)
    steps = run_steps(warm)
    info = next(steps)
    assert (info.step, info.removed, info.ratio) == (0, False, 0.0)
    calibrated = {name: s.clone() for name, s in warm.state.average.items()}
    assert next(steps).loss == next(run_steps(cold)).loss  # nothing was trained in between
    for name, average in warm.state.average.items():
        # Eq. 11 from the calibration, and from zero.
        expected = 0.9 * calibrated[name] + cold.state.average[name]
        torch.testing.assert_close(average, expected, rtol=1e-5, atol=0)  # rounding of the lerp
    assert [info.step for info in steps if info.removed] == warm.schedule.list_events()


def test_calibration_may_take_more_rows_than_there_are(tmp_path):
    training = make_training(
        tmp_path, schedule="one-shot", calibration_samples=128, batch_size=64, micro_batch_size=64
    )
    assert len(training.dataset) < 128
    (info,) = run_steps(training)
    # 128 times a row in turn, but for those that are held out.
    seed = training.options.seed
    rows = list_batch(len(training.dataset), step=0, batch_size=128, seed=seed)
    held_out = list_held_out(training.dataset, seed=seed)
    scored = [row for row in rows if row not in held_out]
    assert len(scored) > len(set(scored)) == len(training.dataset) - len(held_out)
    assert info.tokens_per_s * info.seconds == pytest.approx(len(scored) * 24)
    assert info.removed


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_nan_stops_a_calibration_before_its_scores_count(tmp_path, criterion):
    training = make_training(
        tmp_path, schedule="separate", criterion=criterion, calibration_samples=4
    )
    training.state.model.model.norm.weight.data[0] = float("nan")
    before = {name: p.clone() for name, p in named_lora(training).items()}
    with pytest.raises(NonFiniteError, match="loss became nan at step 0"):
        next(run_steps(training))
    assert not training.state.average
    assert all(len(training.state.kept[s.name]) == s.num_groups for s in training.state.specs)
    for name, parameter in named_lora(training).items():
        assert torch.equal(parameter, before[name])


def test_one_shot_has_no_steps():
    assert count_steps(PruneConfig(schedule="one-shot", steps=5), 20) == 0


@pytest.mark.parametrize(
    ("options", "peak_until"),
    [
        ({"ramp": "early", "prune_cooldown": 0.5}, 6),  # the last event
        ({"ramp": "authors"}, 0),
        ({"ramp": "early", "schedule": "separate", "calibration_samples": 4}, 0),
        ({"ramp": "authors", "lr_hold": 0.5}, 6),
    ],
)
def test_the_rate_is_held_until_the_last_event_of_an_early_ramp(tmp_path, options, peak_until):
    training = make_training(tmp_path, steps=12, lr_warmup=0.0, **options)
    assert training.hold_steps == peak_until


def make_instructions(training, count=16):
    """Give a training rows of very different lengths, with prompts that are not trained on."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 24, size=count)
    training.dataset = TokenDataset(
        tokens=rng.integers(3, 40, size=lengths.sum(), dtype=np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        labelled=np.concatenate([np.arange(length) >= rng.integers(0, 3) for length in lengths]),
    )
    return training


@pytest.mark.parametrize("criterion", ["lora", "gate", "gradient", "wanda"])
def test_rows_sorted_by_length_train_and_score_as_rows_alone(tmp_path, criterion):
    """Eight rows in micro-batches of like length, against a loop over unpadded single rows."""
    options = {"criterion": criterion, "batch_size": 8, "micro_batch_size": 4, "lora_dropout": 0.0}
    training = make_instructions(make_training(tmp_path, **options))
    alone = make_instructions(make_training(tmp_path, **options))
    rows = list_batch(16, step=0, batch_size=8, seed=0)
    with training.state.scorer.observe():
        loss, tokens = _accumulate_gradients(training, rows)
    batches = [alone.dataset.collate([row]) for row in rows]
    targets = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    total = 0.0
    with alone.state.scorer.observe():
        for batch in batches:
            alone.state.scorer.attention_mask = batch["attention_mask"]
            logits = alone.model(input_ids=batch["input_ids"]).logits[0, :-1].float()
            losses = torch.nn.functional.cross_entropy(
                logits, batch["labels"][0, 1:], ignore_index=-100, reduction="sum"
            )
            (losses / targets).backward()
            total += losses.item() / targets
    assert loss == pytest.approx(total, rel=1e-5)
    for mine, expected in zip(training.trainable, alone.trainable, strict=True):
        # Batches of four rows against single rows: float32 sums in another order.
        torch.testing.assert_close(mine.grad, expected.grad, rtol=1e-3, atol=1e-6)
    scores = alone.state.scorer.compute_importance()
    for name, score in training.state.scorer.compute_importance().items():
        torch.testing.assert_close(score, scores[name], rtol=2e-3, atol=0)
    lengths = sorted((len(batch["input_ids"][0]) for batch in batches), reverse=True)
    assert tokens == 4 * (lengths[0] + lengths[4])


def test_a_step_says_how_much_was_padding(tmp_path):
    options = {"batch_size": 4, "micro_batch_size": 2, "steps": 2, "calibration_samples": 8}
    training = make_instructions(make_training(tmp_path, **options))
    infos = list(run_steps(training))
    for info, (first, size) in zip(infos, [(0, 8), (0, 4), (4, 4)], strict=True):
        computed = used = 0
        for start in range(first, first + size, 4):
            batch = list_batch(16, step=start // 4, batch_size=4, seed=0)
            lengths = sorted(int(training.dataset.lengths[row]) for row in batch)
            computed += 2 * (lengths[1] + lengths[3])
            used += sum(lengths)
        assert info.padding == pytest.approx(1 - used / computed)
        assert info.padding > 0.01


def test_packed_text_has_no_padding(tmp_path):
    assert [info.padding for info in run_steps(make_training(tmp_path, steps=2))] == [0.0, 0.0]
