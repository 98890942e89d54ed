"""Each criterion over whole specs, against plain loops and against autograd itself."""

import gc
import weakref

import pytest
import torch

from lpdeploy.config import PruneConfig
from lpdeploy.criteria import CRITERIA, Criterion
from lpdeploy.families.groups import list_group_specs
from lpdeploy.models.adapters import get_base_linear
from lpdeploy.models.cutting import apply_cut
from lpdeploy.pruning.scoring import ScoreForm, Scorer
from tests.helpers import make_lora_model
from tests.pruning.independent import Independent, assert_scores, list_pieces, make_rows

MODELS = {
    "dense": {"heads": 4},
    "grouped": {"heads": 4, "kv_heads": 2},
    "biases": {"model_type": "qwen2", "heads": 4, "kv_heads": 2},
}
# Those that score every step, and those of them that look at it.
STEPWISE = [name for name, criterion in CRITERIA.items() if criterion.score_outputs is None]
KNOWING = [name for name in STEPWISE if name != "random"]
DATA_DRIVEN = [name for name in KNOWING if name != "magnitude"]


def make(tmp_path, *, model="grouped"):
    wrapped = make_lora_model(tmp_path, **MODELS[model])
    causal_lm = wrapped.get_base_model()
    return wrapped, causal_lm, list_group_specs(causal_lm.config)


def observe(scorer, model, batch, *, parts=(slice(None),)):
    """Run a batch in parts, as training does; leave LoRA's gradients in place."""
    model.zero_grad()
    with scorer.observe():
        for rows in parts:
            scorer.attention_mask = batch.mask[rows, : max(batch.lengths[rows])]
            batch.run(model, rows).backward()


def score(scorer, model, batch, **how):
    observe(scorer, model, batch, **how)
    return scorer.compute_importance()


@pytest.mark.parametrize("absolute", [False, True], ids=["squared", "absolute"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", KNOWING)
def test_matches_the_loops_over_whole_specs(name, model, absolute, tmp_path):
    wrapped, causal_lm, specs = make(tmp_path, model=model)
    batch = make_rows()
    scorer = Scorer(CRITERIA[name], causal_lm, specs, form=ScoreForm(absolute=absolute))
    scores = score(scorer, wrapped, batch)
    independent = Independent(tmp_path, causal_lm, specs, batch)
    assert scores.keys() == {spec.name for spec in specs}
    for spec in (specs[0], specs[3]):  # heads of the first layer, channels of the last
        assert scores[spec.name].dtype == torch.float32
        assert_scores(scores[spec.name], independent.expect(name, spec, absolute=absolute))


@pytest.mark.parametrize("name", [name for name in KNOWING if name != "gate"])
def test_normalizing_divides_each_linear_by_its_norm(name, tmp_path):
    wrapped, causal_lm, specs = make(tmp_path)
    batch = make_rows()
    scorer = Scorer(CRITERIA[name], causal_lm, specs, form=ScoreForm(normalize=True))
    scores = score(scorer, wrapped, batch)
    independent = Independent(tmp_path, causal_lm, specs, batch)
    for spec in (specs[0], specs[3]):
        assert_scores(scores[spec.name], independent.expect(name, spec, normalize=True))


@pytest.mark.parametrize("absolute", [False, True], ids=["squared", "absolute"])
@pytest.mark.parametrize("model", MODELS)
def test_the_gate_is_what_a_gate_of_ones_feels(model, absolute, tmp_path):
    wrapped, causal_lm, specs = make(tmp_path, model=model)
    batch = make_rows((12, 12, 7))
    form = ScoreForm(absolute=absolute)
    scores = score(Scorer(CRITERIA["gate"], causal_lm, specs, form=form), wrapped, batch)
    gates = Independent(tmp_path, causal_lm, specs, batch).compute_gate_gradients()
    for name, gradient in gates.items():
        felt = gradient.abs() if absolute else gradient.square()
        assert_scores(scores[name], felt.sum(dim=0))


@pytest.mark.parametrize("name", DATA_DRIVEN)
def test_micro_batches_and_padding_change_nothing(name, tmp_path):
    wrapped, causal_lm, specs = make(tmp_path)
    batch = make_rows((12, 9, 6, 12))  # padding holds ordinary tokens, which must not be seen
    independent = Independent(tmp_path, causal_lm, specs, batch)
    scorer = Scorer(CRITERIA[name], causal_lm, specs)
    for parts in ([slice(None)], [slice(0, 1), slice(1, 3), slice(3, 4)]):
        scores = score(scorer, wrapped, batch, parts=parts)
        for spec in (specs[0], specs[3]):
            assert_scores(scores[spec.name], independent.expect(name, spec))


@pytest.mark.parametrize("absolute", [False, True], ids=["squared", "absolute"])
@pytest.mark.parametrize("name", KNOWING)
def test_gradient_checkpointing_scores_the_same(name, absolute, tmp_path):
    wrapped, causal_lm, specs = make(tmp_path)
    wrapped.train()
    batch = make_rows()
    scorer = Scorer(CRITERIA[name], causal_lm, specs, form=ScoreForm(absolute=absolute))
    plain = score(scorer, wrapped, batch)
    causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = score(scorer, wrapped, batch)
    # Each layer's forward pass runs twice, so Wanda sees each token twice: its energies double.
    factor = {"wanda": 2**0.5 if absolute else 2.0}.get(name, 1.0)
    for spec in specs:
        # The same operations on the same numbers, but for that factor.
        torch.testing.assert_close(again[spec.name], factor * plain[spec.name], rtol=1e-6, atol=0)


def test_offloaded_gradients_go_to_the_cpu_and_score_the_same(tmp_path, monkeypatch):
    wrapped, causal_lm, specs = make(tmp_path)
    batch, moved = make_rows((12, 12)), []
    plain = Scorer(CRITERIA["gradient"], causal_lm, specs)
    offloading = Scorer(CRITERIA["gradient"], causal_lm, specs, offload_gradients=True)
    to_cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda t: moved.append(t.shape) or to_cpu(t))
    expected = score(plain, wrapped, batch)
    assert not moved
    observe(offloading, wrapped, batch, parts=[slice(0, 1), slice(1, 2)])
    weights = [
        get_base_linear(causal_lm.get_submodule(p.module)).weight for p in list_pieces(specs)
    ]
    assert sorted(moved) == sorted([w.shape for w in weights] * 2)  # each, of each micro-batch
    scores = offloading.compute_importance()
    for spec in specs:  # sums of two micro-batches in another order
        assert_scores(scores[spec.name], expected[spec.name])


def assert_untouched(causal_lm, before):
    """Gradients flow to LoRA alone, and no module or weight carries a hook."""
    for name, parameter in causal_lm.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        assert parameter.grad is None or "lora_" in name
        assert not parameter._post_accumulate_grad_hooks
        assert not parameter._backward_hooks
    assert {n: len(m._forward_pre_hooks) for n, m in causal_lm.named_modules()} == before


@pytest.mark.parametrize("name", STEPWISE)
def test_nothing_stays_on_the_model(name, tmp_path):
    wrapped, causal_lm, specs = make(tmp_path)
    before = {n: len(m._forward_pre_hooks) for n, m in causal_lm.named_modules()}
    batch = make_rows()
    scorer = Scorer(CRITERIA[name], causal_lm, specs)
    observe(scorer, wrapped, batch)
    assert_untouched(causal_lm, before)
    with pytest.raises(KeyboardInterrupt), scorer.observe():
        batch.run(wrapped)
        raise KeyboardInterrupt
    assert_untouched(causal_lm, before)


@pytest.mark.parametrize("name", KNOWING)
def test_nothing_of_a_batch_leaks_into_the_next(name, tmp_path):
    wrapped, causal_lm, specs = make(tmp_path)
    first, second = make_rows(seed=1), make_rows(seed=2)
    expected = score(Scorer(CRITERIA[name], causal_lm, specs), wrapped, second)
    scorer = Scorer(CRITERIA[name], causal_lm, specs)
    score(scorer, wrapped, first)
    scored_before = score(scorer, wrapped, second)
    observe(scorer, wrapped, first)  # never scored, as after a loss that is not finite
    broken_off_before = score(scorer, wrapped, second)
    for spec in specs:
        assert torch.equal(scored_before[spec.name], expected[spec.name])
        assert torch.equal(broken_off_before[spec.name], expected[spec.name])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", STEPWISE)
def test_no_activation_outlives_its_batch(name, checkpointing, tmp_path):
    wrapped, causal_lm, specs = make(tmp_path)
    wrapped.train()
    if checkpointing:
        causal_lm.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    seen = []
    for piece in list_pieces(specs):
        causal_lm.get_submodule(piece.module).register_forward_pre_hook(
            lambda _, args: seen.append(weakref.ref(args[0]))
        )
    observe(Scorer(CRITERIA[name], causal_lm, specs), wrapped, make_rows())
    gc.collect()
    assert len(seen) >= 14
    assert not [reference for reference in seen if reference() is not None]


@pytest.mark.parametrize("name", STEPWISE)
def test_scores_follow_a_cut(name, tmp_path):
    wrapped, causal_lm, specs = make(tmp_path)
    kept = {spec.name: torch.arange(1, spec.num_groups, 2) for spec in specs}
    apply_cut(causal_lm, specs, kept)
    scores = score(Scorer(CRITERIA[name], causal_lm, specs), wrapped, make_rows())
    assert {n: s.shape for n, s in scores.items()} == {n: k.shape for n, k in kept.items()}
    assert all(s.isfinite().all() and (s > 0).all() for s in scores.values())


@pytest.mark.parametrize("name", KNOWING)
def test_permuting_heads_permutes_their_importance(name, tmp_path):
    wrapped, causal_lm, specs = make(tmp_path, model="dense")
    batch, order = make_rows(), torch.tensor([2, 0, 3, 1])
    scorer = Scorer(CRITERIA[name], causal_lm, specs)
    plain = score(scorer, wrapped, batch)
    # A "cut" to all heads in another order: the model computes the same.
    apply_cut(causal_lm, specs, {"layers.0.heads": order})
    moved = score(scorer, wrapped, batch)
    assert_scores(moved["layers.0.heads"], plain["layers.0.heads"][order])
    assert_scores(moved["layers.0.channels"], plain["layers.0.channels"])


def test_random_draws_by_the_seed_alone(tmp_path):
    _, causal_lm, specs = make(tmp_path)
    scorer = Scorer(CRITERIA["random"], causal_lm, specs)
    torch.manual_seed(3)
    first, second = scorer.compute_importance(), scorer.compute_importance()
    torch.manual_seed(3)
    again = Scorer(CRITERIA["random"], causal_lm, specs).compute_importance()
    for spec in specs:
        assert torch.equal(first[spec.name], again[spec.name])
        assert not torch.equal(first[spec.name], second[spec.name])


def test_lora_needs_gradients(tmp_path):
    _, causal_lm, specs = make(tmp_path)
    with pytest.raises(ValueError, match="call backward first"):
        Scorer(CRITERIA["lora"], causal_lm, specs).compute_importance()


def test_an_unknown_criterion_names_the_known_ones():
    with pytest.raises(ValueError, match="`criterion` is 'guess'; .* lora, gate, gradient"):
        PruneConfig(criterion="guess")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"score_weights": lambda _: None, "score_groups": torch.rand},
        {"score_groups": torch.rand, "weight_gradients": True},
        {
            "score_weights": lambda _: None,
            "weight_gradients": True,
            "measure_inputs": torch.square,
        },
    ],
)
def test_a_record_that_cannot_score_is_refused(fields):
    with pytest.raises(ValueError, match="criterion 'mine' m"):
        Criterion(name="mine", words="mine", help="mine", **fields)
