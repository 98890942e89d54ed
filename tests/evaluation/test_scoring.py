"""Log-likelihoods against one forward pass a token."""

import math

import pytest
import torch

from lpdeploy.engines.onnx.runner import load_onnx_runner
from lpdeploy.engines.runner import Output
from lpdeploy.engines.torch.runner import load_torch_runner
from lpdeploy.errors import DataError, NonFiniteError
from lpdeploy.evaluation.scoring import compute_loglikelihoods
from tests.helpers import make_export

PAIRS = [
    ([5, 17, 40], [9, 8]),
    ([7], [33]),
    ([5, 17, 40], [9, 11]),  # shares all but its last token with the first
    ([5, 17, 40, 9], [3]),  # shares its input with both, and scores less of it
    ([1, 2, 3, 4, 5, 6, 7, 8], [61]),
    ([1, 2, 3, 4, 5, 6, 7, 8], [62]),
    ([9, 2], [61, 7, 29, 11, 30, 4]),
]


@pytest.fixture(scope="module", params=["torch", "onnx"])
def runner(request):
    model, _, exported = make_export("per-layer")
    return load_torch_runner(model) if request.param == "torch" else load_onnx_runner(exported)


class Recorder:
    """Passes on to a runner, with fewer positions if asked, and notes what is run."""

    def __init__(self, runner, max_positions=None):
        self.runner, self.shapes = runner, []
        self.name, self.precision = runner.name, runner.precision
        self.max_positions = max_positions or runner.max_positions

    def forward(self, input_ids, *, attention_mask, past=None):
        self.shapes.append(tuple(input_ids.shape))
        return self.runner.forward(input_ids, attention_mask=attention_mask, past=past)


def score_by_loop(runner, context, continuation):
    total, greedy, seen = 0.0, True, list(context)
    for token in continuation:
        ids = torch.tensor([seen])
        logits = runner.forward(ids, attention_mask=torch.ones_like(ids)).logits[0, -1].double()
        scores = logits.tolist()
        total += scores[token] - math.log(sum(math.exp(score) for score in scores))
        greedy = greedy and scores.index(max(scores)) == token
        seen.append(token)
    return total, greedy


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_scores_equal_a_loop(runner, batch_size):
    likely, _ = max(
        ((token, score_by_loop(runner, [7], [token])[0]) for token in range(runner.vocab_size)),
        key=lambda item: item[1],
    )
    pairs = [*PAIRS, ([7], [likely])]
    found = compute_loglikelihoods(runner, pairs, batch_size=batch_size)
    for score, pair in zip(found, pairs, strict=True):
        total, greedy = score_by_loop(runner, *pair)
        # fp32 logits of another batch shape, summed over up to six tokens.
        assert score.loglikelihood == pytest.approx(total, abs=1e-4)
        assert score.is_greedy == greedy
    assert found[-1].is_greedy
    assert not found[0].is_greedy


def test_the_longest_come_first_and_equal_inputs_once():
    recorder = Recorder(load_torch_runner(make_export("per-layer")[0]))
    told = []
    compute_loglikelihoods(recorder, PAIRS, batch_size=2, on_progress=lambda *n: told.append(n))
    # Inputs of 8 (two letters), 7, 4 (three of PAIRS) and 1 tokens.
    assert recorder.shapes == [(2, 8), (2, 4)]
    assert told == [(3, 7), (7, 7)]


def test_the_context_loses_its_left(runner):
    short = Recorder(runner, max_positions=6)
    context, continuation = [9, 2, 33, 4, 17, 5, 6], [61, 7]
    (score,) = compute_loglikelihoods(short, [(context, continuation)], batch_size=1)
    assert short.shapes == [(1, 6)]
    # Six positions: five tokens of the context and the first of the continuation.
    expected, _ = score_by_loop(runner, context[-5:], continuation)
    assert score.loglikelihood == pytest.approx(expected, abs=1e-4)


def test_a_continuation_of_all_positions(runner):
    short = Recorder(runner, max_positions=3)
    (score,) = compute_loglikelihoods(short, [([9, 2], [61, 7, 5])], batch_size=1)
    expected, _ = score_by_loop(runner, [2], [61, 7, 5])
    assert score.loglikelihood == pytest.approx(expected, abs=1e-4)
    with pytest.raises(DataError, match="has 4 tokens, the model only 3 positions. Take it out"):
        compute_loglikelihoods(short, [([9], [61, 7, 5, 4])], batch_size=1)


def test_an_empty_continuation_is_refused(runner):
    with pytest.raises(DataError, match="no tokens: .* Take it out of the task"):
        compute_loglikelihoods(runner, [([9], [])], batch_size=1)


def test_not_a_number_is_refused():
    class Broken:
        name, precision, max_positions = "torch", "fp16", 8

        def forward(self, input_ids, **_):
            return Output(torch.full((*input_ids.shape, 16), math.nan), None)

    with pytest.raises(NonFiniteError, match="fp16 model on torch is nan. Evaluate in fp32, or"):
        compute_loglikelihoods(Broken(), [([1], [2])], batch_size=1)
