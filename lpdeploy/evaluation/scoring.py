"""Log-likelihoods of continuations on any engine, batched by length."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lpdeploy.engines.runner import Runner
from lpdeploy.errors import DataError, NonFiniteError

Pair = tuple[list[int], list[int]]
"""Tokens of a context and of its continuation, at least one each."""


class Score(NamedTuple):
    """How likely a continuation is.

    Attributes:
        loglikelihood: Sum over its tokens, in nats.
        is_greedy: Whether each of its tokens is the most likely one.
    """

    loglikelihood: float
    is_greedy: bool


def compute_loglikelihoods(
    runner: Runner,
    pairs: Sequence[Pair],
    *,
    batch_size: int,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> list[Score]:
    """Score continuations, each given its own context.

    The longest come first, so that a batch that does not fit in memory fails at once. Pairs that
    differ only in their last token, as the letters of one question do, share one forward pass.
    What is longer than the model's positions loses tokens on the left, of the context alone.

    Args:
        runner: The model, on any engine.
        pairs: What to score.
        batch_size: Rows a forward pass.
        on_progress: Is told (pairs done, all pairs).

    Returns:
        One score a pair, in the order of ``pairs``.

    Raises:
        DataError: A continuation has no tokens, or more than the model has positions.
        NonFiniteError: A log-likelihood is NaN or infinite.
    """
    by_input: dict[tuple[int, ...], list[int]] = {}
    for index, pair in enumerate(pairs):
        by_input.setdefault(_cut_input(runner, *pair), []).append(index)
    inputs = sorted(by_input, key=lambda ids: (-len(ids), ids))
    scores: dict[int, Score] = {}
    for start in range(0, len(inputs), batch_size):
        batch = inputs[start : start + batch_size]
        for ids, logits in zip(batch, _run(runner, batch), strict=True):
            for index in by_input[ids]:
                scores[index] = _score(logits[: len(ids)], pairs[index][1])
                if not math.isfinite(scores[index].loglikelihood):
                    raise NonFiniteError(
                        f"A log-likelihood of the {runner.precision} model on {runner.name} is "
                        f"{scores[index].loglikelihood}. Evaluate in fp32, or check that the "
                        "weights are whole."
                    )
        on_progress(len(scores), len(pairs))
    return [scores[index] for index in range(len(pairs))]


def _cut_input(runner: Runner, context: list[int], continuation: list[int]) -> tuple[int, ...]:
    """Return what the model reads: all tokens but the last, which it only predicts."""
    if not continuation:
        raise DataError(
            "An answer has no tokens: the model's tokenizer drops all of its text. "
            "Take it out of the task."
        )
    if len(continuation) > runner.max_positions:
        raise DataError(
            f"An answer has {len(continuation)} tokens, the model only {runner.max_positions} "
            "positions. Take it out of the task."
        )
    return tuple((context + continuation)[-(runner.max_positions + 1) : -1])


def _run(runner: Runner, batch: Sequence[tuple[int, ...]]) -> Iterator[Tensor]:
    """Yield the logits (T, vocab) of each row, T the length of the longest."""
    longest = max(map(len, batch))
    # On the right, where causal attention never looks; so nothing is masked.
    input_ids = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in batch])
    with torch.no_grad():
        output = runner.forward(input_ids, attention_mask=torch.ones_like(input_ids))
    yield from output.logits


def _score(logits: Tensor, continuation: list[int]) -> Score:
    """Score the tokens that follow the last rows of (T, vocab)."""
    logits = logits[-len(continuation) :].float()  # (C, vocab): the context predicts nothing
    wanted = torch.tensor(continuation, device=logits.device)
    chosen = logits.gather(1, wanted.unsqueeze(1)).squeeze(1)  # (C, 1) -> (C,)
    total = (chosen - logits.logsumexp(dim=-1)).sum()
    return Score(float(total), bool((logits.argmax(dim=-1) == wanted).all()))
