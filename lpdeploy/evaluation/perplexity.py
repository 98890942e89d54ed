"""Perplexity of a text on any engine, by the protocol of the paper."""

import logging
import math
from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from lpdeploy.data.batches import (
    IGNORED,
    TokenDataset,
    build_token_dataset,
    build_token_stream,
    pack_rows,
)
from lpdeploy.data.sources import Corpus
from lpdeploy.engines.runner import Runner
from lpdeploy.errors import DataError, LpdeployError, NonFiniteError
from lpdeploy.evaluation.results import Perplexity

logger = logging.getLogger(__name__)

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
    incomplete last segment is left out, unless it is the only one.

    A conversation or an instruction pair is a segment of its own, as in training: written with the
    chat template, truncated at ``seq_len``, and only the answers are predicted.

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
        DataError: The corpus has fewer than 2 tokens, or no answer begins within ``seq_len``.
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
    segments, tokens_per_byte = _cut_segments(
        corpus, tokenizer, seq_len=seq_len, max_segments=max_segments
    )
    total, tokens = 0.0, 0
    for start in range(0, len(segments), batch_size):
        rows = range(start, min(start + batch_size, len(segments)))
        batch = segments.collate(rows)
        total += _sum_losses(runner, batch["input_ids"], batch["labels"])
        tokens += int((batch["labels"][:, 1:] != IGNORED).sum())
        if not math.isfinite(total):
            _refuse_non_finite(runner, f"{total} at segment {rows.stop} of {len(segments)}")
        if on_progress is not None:
            on_progress(rows.stop, len(segments))
    return _summarize(runner, total / tokens, tokens=tokens, tokens_per_byte=tokens_per_byte)


def _cut_segments(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    max_segments: int | None,
) -> tuple[TokenDataset, float]:
    """Cut a corpus into segments, and count the tokens of a byte of what they predict."""
    if corpus.is_chat:
        whole = build_token_dataset(corpus, tokenizer, seq_len=seq_len)
        if whole.num_cut or whole.num_dropped:
            logger.warning(
                "Conversations of '%s' that are longer than `seq_len` %s are not measured beyond "
                "it. Without any answer: %s; without the end of one: %s.",
                corpus.source, seq_len, whole.num_dropped, whole.num_cut,
            )  # fmt: skip
    else:
        stream = build_token_stream(corpus, tokenizer)
        if len(stream) < 2:
            raise DataError(
                f"'{corpus.source}' holds {len(stream)} token, which leaves none to predict. "
                "Give more text."
            )
        length = min(seq_len, len(stream))
        whole = pack_rows(stream[: len(stream) // length * length], seq_len=length)
        if max_segments is None or max_segments >= len(whole):
            num_bytes = sum(len(example.text.encode()) for example in corpus.examples)
            return whole, len(stream) / num_bytes
    segments = whole.select(range(min(len(whole), max_segments or len(whole))))
    predicted = segments.tokens[segments.labelled]
    text = tokenizer.decode(predicted.tolist(), skip_special_tokens=True)
    return segments, len(predicted) / max(1, len(str(text).encode()))


def _sum_losses(runner: Runner, input_ids: Tensor, labels: Tensor) -> float:
    """Sum the negative log-likelihoods (nats) of what is labelled in rows (B, T), but the first."""
    with torch.no_grad():
        # Shorter rows are padded on the right, where no earlier token attends to the padding.
        logits = runner.forward(input_ids, attention_mask=torch.ones_like(input_ids)).logits
        # The last position of each row predicts nothing. Ignoring it by its target, rather than
        # cutting it off, leaves the logits (B, T, V) in place: a cut would copy all of them.
        targets = torch.full_like(labels, IGNORED)
        targets[:, :-1] = labels[:, 1:]
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


def _summarize(runner: Runner, mean: float, *, tokens: int, tokens_per_byte: float) -> Perplexity:
    try:
        perplexity = math.exp(mean)
    except OverflowError:
        _refuse_non_finite(runner, f"{mean:.0f} a token")
    return Perplexity(perplexity, bits_per_byte=mean / math.log(2) * tokens_per_byte, tokens=tokens)


def _refuse_non_finite(runner: Runner, loss: str) -> NoReturn:
    raise NonFiniteError(
        f"The loss of the {runner.precision} model on {runner.name} is {loss}. "
        "Evaluate in fp32, or check that the weights are whole."
    )
