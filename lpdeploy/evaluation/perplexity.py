"""Perplexity of a text on any engine, by the protocol of the paper."""

import math
from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from lpdeploy.data.batches import IGNORED, build_token_stream
from lpdeploy.data.sources import Corpus
from lpdeploy.engines.runner import Runner
from lpdeploy.errors import DataError, LpdeployError, NonFiniteError
from lpdeploy.evaluation.results import Perplexity

# Positions whose log-softmax is taken at once: 64 MB beside the logits at 32,000 tokens.
_POSITIONS_AT_ONCE = 512


def compute_perplexity(
    runner: Runner,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    max_segments: int | None = None,
    batch_size: int = 4,
    on_progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Measure the perplexity of a model on a corpus.

    The documents, each with its bos and eos, are joined and cut into segments of ``seq_len`` that
    do not overlap. Each segment is predicted by itself, all its tokens but the first. An
    incomplete last segment is left out, unless it is the only one. An instruction pair counts as
    one document, its prompt included.

    Args:
        runner: The model, on any engine.
        corpus: What to predict.
        tokenizer: That of the model.
        seq_len: Tokens a segment; 2,048 in the paper. At least 2.
        max_segments: Only the first so many segments; None for all, as in the paper.
        batch_size: Segments a forward pass.
        on_progress: Is told (segments done, all segments).

    Raises:
        ValueError: ``seq_len`` is below 2.
        LpdeployError: The model has fewer positions than ``seq_len``.
        DataError: The corpus has fewer than 2 tokens.
        NonFiniteError: The loss is NaN or infinite.

    Source:
        LoRAPrune, arXiv:2305.18403, Section 4.1 and Table 2, which follows SparseGPT,
        arXiv:2301.00774. There, the whole text has one bos and no eos: the same, but for the last
        token, where the text is one document, as WikiText-2 and PTB of the hub are here.
    """
    if seq_len < 2:
        raise ValueError(f"seq_len is {seq_len}; a segment needs 2 tokens to predict one")
    if seq_len > runner.max_positions:
        raise LpdeployError(
            f"The model has {runner.max_positions} positions; "
            f"use `seq_len={runner.max_positions}` or less."
        )
    stream = torch.from_numpy(build_token_stream(corpus, tokenizer)).long()
    whole = _cut_segments(stream, seq_len, source=corpus.source)
    segments = whole[:max_segments]
    total = 0.0
    for start in range(0, len(segments), batch_size):
        batch = segments[start : start + batch_size]
        total += _sum_losses(runner, batch)
        done = start + len(batch)
        if not math.isfinite(total):
            _refuse_non_finite(runner, f"{total} at segment {done} of {len(segments)}")
        if on_progress is not None:
            on_progress(done, len(segments))
    tokens = segments.shape[0] * (segments.shape[1] - 1)
    if len(segments) == len(whole) and not corpus.is_chat:
        ratio = len(stream) / sum(len(example.text.encode()) for example in corpus.examples)
    else:
        part = stream if len(segments) == len(whole) else segments.flatten()
        ratio = len(part) / max(1, _count_bytes(part, tokenizer))
    return _summarize(runner, total / tokens, tokens=tokens, ratio=ratio)


def _count_bytes(tokens: Tensor, tokenizer: PreTrainedTokenizerBase) -> int:
    text = tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
    return len(str(text).encode())


def _cut_segments(stream: Tensor, seq_len: int, *, source: str) -> Tensor:
    """Cut (N,) into (segments, seq_len), or into (1, N) where it is shorter than one."""
    if len(stream) < 2:
        raise DataError(
            f"'{source}' holds {len(stream)} token, which leaves none to predict. Give more text."
        )
    count = len(stream) // seq_len
    if count == 0:
        return stream.unsqueeze(0)
    return stream[: count * seq_len].view(count, seq_len)  # (S*T,) -> (S, T)


def _sum_losses(runner: Runner, input_ids: Tensor) -> float:
    """Sum the negative log-likelihoods (nats) of all tokens of (B, T) but the first of each row."""
    with torch.no_grad():
        logits = runner.forward(input_ids, attention_mask=torch.ones_like(input_ids)).logits
        # The last position of each row predicts nothing. Ignoring it by its target, rather than
        # cutting it off, leaves the logits (B, T, V) in place: a cut would copy all of them.
        targets = torch.full_like(input_ids, IGNORED)
        targets[:, :-1] = input_ids[:, 1:]
        pieces = zip(
            logits.flatten(0, 1).split(_POSITIONS_AT_ONCE),  # (B, T, V) -> (B*T, V)
            targets.flatten().to(logits.device).split(_POSITIONS_AT_ONCE),
            strict=True,
        )
        return sum(
            functional.cross_entropy(
                piece.float(), target, ignore_index=IGNORED, reduction="sum"
            ).item()
            for piece, target in pieces
        )


def _summarize(runner: Runner, mean: float, *, tokens: int, ratio: float) -> Perplexity:
    try:
        perplexity = math.exp(mean)
    except OverflowError:
        _refuse_non_finite(runner, f"{mean:.0f} a token")
    return Perplexity(perplexity, bits_per_byte=mean / math.log(2) * ratio, tokens=tokens)


def _refuse_non_finite(runner: Runner, loss: str) -> NoReturn:
    raise NonFiniteError(
        f"The loss of the {runner.precision} model on {runner.name} is {loss}. "
        "Evaluate in fp32, or check that the weights are whole."
    )
