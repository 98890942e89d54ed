"""Generation against ``model.generate`` of transformers, on both engines."""

import pytest
import torch

from lpdeploy.engines.generation import generate
from lpdeploy.engines.onnx.runner import load_onnx_runner
from lpdeploy.engines.runner import Output, pad_left
from lpdeploy.engines.sampling import Sampling
from lpdeploy.engines.torch.runner import load_torch_runner
from lpdeploy.models.loading import load_model
from tests.helpers import make_export

PROMPTS = [[5, 17, 40], [9], [33, 2, 8, 61, 7, 29, 11]]
NEW = 64


@pytest.fixture(scope="module", params=["torch", "onnx"])
def runner(request):
    model, _, exported = make_export("per-layer")
    return load_torch_runner(model) if request.param == "torch" else load_onnx_runner(exported)


def generate_with_transformers(eos_ids):
    model = load_model(make_export("per-layer")[0])
    model.generation_config.eos_token_id = sorted(eos_ids) or None
    ids, mask = pad_left(PROMPTS)
    written = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0
    )
    return written[:, ids.shape[1] :].tolist()


def cut_at_stop(row, eos_ids):
    stops = [index for index, token in enumerate(row) if token in eos_ids]
    return row[: stops[0] + 1] if stops else row


def test_greedy_equals_transformers(runner):
    written = generate(runner, PROMPTS, max_new_tokens=NEW, eos_ids=set())
    assert written == generate_with_transformers(set())
    assert len({tuple(row) for row in written}) == 3
    assert all(len(row) == NEW for row in written)


def test_rows_stop_on_their_own(runner):
    free = generate(runner, PROMPTS, max_new_tokens=NEW, eos_ids=set())
    eos_ids = {free[0][2], free[1][6]}
    expected = [cut_at_stop(row, eos_ids) for row in generate_with_transformers(eos_ids)]
    assert generate(runner, PROMPTS, max_new_tokens=NEW, eos_ids=eos_ids) == expected
    assert len({len(row) for row in expected}) > 1


def test_a_row_does_not_depend_on_its_batch(runner):
    together = generate(runner, PROMPTS, max_new_tokens=6, eos_ids=set())
    alone = [generate(runner, [p], max_new_tokens=6, eos_ids=set())[0] for p in PROMPTS]
    assert together == alone


def test_sampling_repeats_with_its_seed(runner):
    def sample(seed, temperature=1.5):
        return generate(
            runner,
            PROMPTS,
            max_new_tokens=8,
            eos_ids=set(),
            sampling=Sampling(temperature=temperature, seed=seed),
        )

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    # Logits are far apart at this temperature: only the largest has any probability left.
    assert sample(3, temperature=1e-3) == generate(runner, PROMPTS, max_new_tokens=8, eos_ids=set())


def test_a_sampled_row_does_not_depend_on_its_batch(runner):
    sampling = Sampling(temperature=1.5, seed=4)
    together = generate(runner, PROMPTS, max_new_tokens=6, eos_ids=set(), sampling=sampling)
    first = generate(runner, PROMPTS[:1], max_new_tokens=6, eos_ids=set(), sampling=sampling)
    assert together[0] == first[0]


def test_tokens_are_told_as_they_are_chosen(runner):
    told = []
    rows = generate(
        runner, PROMPTS, max_new_tokens=3, eos_ids=set(), on_token=lambda *now: told.append(now)
    )
    assert told == [(row, rows[row][place]) for place in range(3) for row in range(len(PROMPTS))]


class TableRunner:
    """Always the same distribution, and a count of how often it was asked."""

    name = "torch"
    precision = "fp32"
    vocab_size = 3
    max_positions = 40

    def __init__(self):
        self.calls = 0

    def forward(self, input_ids, *, attention_mask, past=None, **_):
        self.calls += 1
        assert attention_mask.shape[1] == (past or 0) + input_ids.shape[1]
        logits = torch.tensor([0.0, 2.0, -50.0]).expand(*input_ids.shape, 3)
        return Output(logits, attention_mask.shape[1])


def test_sampling_follows_the_temperature():
    rows = generate(
        TableRunner(),
        [[0]] * 400,
        max_new_tokens=10,
        eos_ids=set(),
        sampling=Sampling(temperature=2.0, seed=0),
    )
    share = sum(row.count(1) for row in rows) / 4000
    # sigmoid(2 / 2) = 0.731; four standard errors of 4,000 draws.
    assert share == pytest.approx(0.731, abs=0.028)
    assert sum(row.count(2) for row in rows) == 0


def test_nothing_runs_after_the_last_row_has_stopped():
    runner = TableRunner()
    assert generate(runner, [[0], [0, 0]], max_new_tokens=9, eos_ids={1}) == [[1], [1]]
    assert runner.calls == 1


def test_no_prompt():
    assert generate(TableRunner(), [], max_new_tokens=1, eos_ids=set()) == []


@pytest.mark.parametrize(
    ("prompts", "options", "sentence"),
    [
        ([[1], []], {}, "prompt 1 is empty; give at least one token"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ([[1] * 32], {}, "need 41 positions, the model has 40; shorten the prompt"),
    ],
)
def test_wrong_arguments(prompts, options, sentence):
    arguments = {"max_new_tokens": 9, "eos_ids": set(), **options}
    with pytest.raises(ValueError, match=sentence):
        generate(TableRunner(), prompts, **arguments)
