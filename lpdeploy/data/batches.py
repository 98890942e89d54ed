"""A corpus as rows of tokens, the rows of each step, and rows as tensors."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from lpdeploy.data.chat import find_chat_template, render_chat
from lpdeploy.data.rows import Example
from lpdeploy.data.sources import Corpus
from lpdeploy.errors import DataError

IGNORED = -100
"""Label of a token that is not trained on."""
_EXAMPLES_A_CALL = 1000

Progress = Callable[[int, int], None]
"""Called with the number that is done and the number of all."""


@dataclass(frozen=True, eq=False)
class TokenDataset:
    """Rows of tokens in flat arrays: 5 bytes per token, and no Python objects.

    Attributes:
        tokens: The tokens of all rows, shape (N,).
        labelled: Which tokens are trained on, shape (N,).
        offsets: Row i is ``tokens[offsets[i]:offsets[i + 1]]``, shape (rows + 1,).
        num_dropped: Number of examples without a row, because no answer begins within ``seq_len``.
        num_cut: Number of rows that lack the end of an answer, because ``seq_len`` cuts it off.
        chat_template: The template that conversations were written with; None for plain text.
    """

    tokens: NDArray[np.int32]
    labelled: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    num_dropped: int = 0
    num_cut: int = 0
    chat_template: str | None = None

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens of each row, shape (rows,)."""
        return np.diff(self.offsets)

    @cached_property
    def sha256(self) -> str:
        """Hash of everything that a model is trained on."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.labelled, self.offsets):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def select(self, rows: Sequence[int]) -> "TokenDataset":
        """Copy some rows, in their order."""
        places = [slice(self.offsets[row], self.offsets[row + 1]) for row in rows]
        return TokenDataset(
            tokens=np.concatenate([self.tokens[place] for place in places]),
            labelled=np.concatenate([self.labelled[place] for place in places]),
            offsets=np.concatenate([[0], np.cumsum(self.lengths[list(rows)])]).astype(np.int64),
            chat_template=self.chat_template,
        )

    def collate(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Stack rows, padded on the right to the longest.

        Args:
            indices: B rows; at least one.

        Returns:
            ``input_ids`` (0 at padding), ``labels`` (not shifted; -100 at padding and at what is
            not trained on) and ``attention_mask``, each shape (B, T), int64.

        Raises:
            ValueError: ``indices`` is empty.
        """
        if not indices:
            raise ValueError("indices must name at least one row")
        rows, labels = [], []
        for index in indices:
            place = slice(self.offsets[index], self.offsets[index + 1])
            rows.append(torch.from_numpy(self.tokens[place].astype(np.int64)))
            labelled = torch.from_numpy(self.labelled[place].copy())
            labels.append(torch.where(labelled, rows[-1], IGNORED))
        return {
            "input_ids": pad_sequence(rows, batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
            "attention_mask": pad_sequence(
                [torch.ones_like(row) for row in rows], batch_first=True
            ),
        }


def build_token_dataset(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    train_on_prompt: bool = False,
    prompt_format: str | None = None,
    on_progress: Progress | None = None,
) -> TokenDataset:
    """Tokenize a corpus into rows to train on.

    Plain text is packed: documents, each with its bos and eos, are joined and cut into rows of
    exactly ``seq_len``. The rest is dropped. Each conversation is one row, as its chat template
    writes it, truncated at ``seq_len``; only its answers are trained on.

    Args:
        corpus: Plain text or conversations.
        tokenizer: A transformers tokenizer. Its bos and eos, if it has them, are always added to
            plain text. A chat template adds its own.
        seq_len: Largest number of tokens per row; at least 2.
        train_on_prompt: Whether all tokens of a conversation are trained on.
        prompt_format: As for ``find_chat_template``.
        on_progress: Called with (examples tokenized, all examples).

    Raises:
        ValueError: ``seq_len`` is below 2.
        DataError: There is less text than one row, no answer begins within ``seq_len``, or a
            conversation cannot be written with the chat template.
    """
    if seq_len < 2:
        raise ValueError(f"seq_len is {seq_len}; a row needs 2 tokens to predict one")
    if corpus.is_chat:
        return _build_chats(
            corpus,
            tokenizer,
            seq_len=seq_len,
            train_on_prompt=train_on_prompt,
            template=find_chat_template(tokenizer, prompt_format),
            on_progress=on_progress,
        )
    tokens = build_token_stream(corpus, tokenizer, on_progress=on_progress)
    rows = len(tokens) // seq_len
    if rows == 0:
        raise DataError(
            f"'{corpus.source}' holds {len(tokens)} tokens, but one row of `seq_len` {seq_len} "
            f"needs {seq_len}. Give more text, or a smaller `seq_len`."
        )
    return pack_rows(tokens[: rows * seq_len], seq_len=seq_len)


def pack_rows(tokens: NDArray[np.int32], *, seq_len: int) -> TokenDataset:
    """Cut tokens, all of which are trained on, into rows of one length that divides them."""
    return TokenDataset(
        tokens=tokens,
        labelled=np.ones(len(tokens), dtype=np.bool_),
        offsets=np.arange(0, len(tokens) + 1, seq_len, dtype=np.int64),
    )


def build_token_stream(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, *, on_progress: Progress | None = None
) -> NDArray[np.int32]:
    """Join all documents of a plain text, each as bos, tokens, eos; shape (N,)."""
    bos, eos = _get_ends(tokenizer)
    pieces: list[NDArray[np.int32]] = []
    for examples in _iterate_chunks(corpus.examples, on_progress):
        encoded = _tokenize(tokenizer, [each.text for each in examples])["input_ids"]
        pieces.append(np.array([t for ids in encoded for t in (*bos, *ids, *eos)], dtype=np.int32))
    return np.concatenate(pieces)


def list_batch(num_rows: int, *, step: int, batch_size: int, seed: int) -> list[int]:
    """List the rows of one optimizer step.

    Each epoch has a new random order, and a batch may extend into the next epoch, so that every
    batch is full. The result depends only on the arguments, so a resumed run sees the same data.

    Args:
        num_rows: Number of rows in the data set; may be less than ``batch_size``.
        step: Optimizer step, counted from 0.
        batch_size: Number of rows per step.
        seed: Seed of the order; at least 0.

    Raises:
        ValueError: ``num_rows`` or ``batch_size`` is below 1, or ``step`` or ``seed`` below 0.
    """
    if num_rows < 1 or batch_size < 1 or step < 0 or seed < 0:
        raise ValueError(
            f"num_rows {num_rows} and batch_size {batch_size} must be at least 1, "
            f"step {step} and seed {seed} at least 0"
        )
    first = step * batch_size
    places = [divmod(place, num_rows) for place in range(first, first + batch_size)]
    return [int(_permute(num_rows, seed=seed, epoch=epoch)[place]) for epoch, place in places]


def split_batch(
    rows: Sequence[int], lengths: NDArray[np.int64], *, micro_batch_size: int
) -> list[list[int]]:
    """Split the rows of a step into micro-batches of similar lengths, the longest rows first.

    This saves padding, since a micro-batch is padded to its longest row. The gradient of the step
    is a sum over its rows and does not depend on the split. Rows of equal length keep their order.

    Args:
        rows: Rows of one optimizer step.
        lengths: Number of tokens of every row of the data set, shape (all rows,).
        micro_batch_size: Number of rows per micro-batch; the last one may have fewer.
    """
    ordered = sorted(rows, key=lengths.__getitem__, reverse=True)
    return [ordered[i : i + micro_batch_size] for i in range(0, len(rows), micro_batch_size)]


def estimate_padding(
    lengths: NDArray[np.int64], *, batch_size: int, micro_batch_size: int, steps: int, seed: int
) -> float:
    """Estimate the share of padding among the tokens that a run computes with.

    Args:
        lengths: Number of tokens of every row of the data set, shape (rows,).
        batch_size: Number of rows per step.
        micro_batch_size: Number of rows per micro-batch.
        steps: Number of steps of the run; only the first hundred are counted.
        seed: Seed of the order of the rows.
    """
    if (lengths == lengths[0]).all():
        return 0.0
    used = computed = 0
    for step in range(min(steps, 100)):
        rows = list_batch(len(lengths), step=step, batch_size=batch_size, seed=seed)
        micros = split_batch(rows, lengths, micro_batch_size=micro_batch_size)
        used += int(lengths[rows].sum())
        computed += sum(len(micro) * int(lengths[micro].max()) for micro in micros)
    return 1 - used / computed if computed else 0.0


# Shuffling millions of rows costs as much as a step of a small model. A batch may need two epochs.
@lru_cache(maxsize=2)
def _permute(num_rows: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(num_rows)


def _build_chats(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    train_on_prompt: bool,
    template: str,
    on_progress: Progress | None,
) -> TokenDataset:
    tokens: list[NDArray[np.int32]] = []
    labelled: list[NDArray[np.bool_]] = []
    num_cut = 0
    for examples in _iterate_chunks(corpus.examples, on_progress):
        for ids, in_answer in _encode_chats(examples, tokenizer, template):
            if in_answer[1:seq_len].any():  # nothing predicts the first token
                tokens.append(ids[:seq_len])
                labelled.append(in_answer[:seq_len] | train_on_prompt)
                num_cut += bool(in_answer[seq_len:].any())
    if not tokens:
        raise DataError(
            f"No answer of '{corpus.source}' begins within `seq_len` {seq_len}: its prompts are "
            "longer. Use a larger `seq_len`."
        )
    return TokenDataset(
        tokens=np.concatenate(tokens),
        labelled=np.concatenate(labelled),
        offsets=np.cumsum([0, *map(len, tokens)], dtype=np.int64),
        num_dropped=len(corpus.examples) - len(tokens),
        num_cut=num_cut,
        chat_template=template,
    )


def _encode_chats(
    examples: list[Example], tokenizer: PreTrainedTokenizerBase, template: str
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
    """Yield the tokens of each conversation, and which of them are of an answer.

    Raises:
        DataError: The template fails, or the tokenizer does not say where its tokens are.
    """
    if not tokenizer.is_fast:
        raise DataError(
            "The tokenizer does not say where in a text its tokens are, so that answers cannot be "
            "told from prompts. Convert it to a tokenizer.json, or give plain text."
        )
    rendered = [render_chat(each.messages, tokenizer, template) for each in examples]
    encoded = _tokenize(tokenizer, [each.text for each in rendered], return_offsets_mapping=True)
    for chat, ids, places in zip(
        rendered, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        starts, ends = np.array(places).reshape(-1, 2).T
        # A token that spans the border between a prompt and its answer is trained on.
        inside = [(ends > first) & (starts < last) for first, last in chat.answers]
        yield np.array(ids, dtype=np.int32), np.logical_or.reduce(inside)


def _iterate_chunks(
    examples: list[Example], on_progress: Progress | None
) -> Iterator[list[Example]]:
    for start in range(0, len(examples), _EXAMPLES_A_CALL):
        chunk = examples[start : start + _EXAMPLES_A_CALL]
        yield chunk
        if on_progress is not None:
            on_progress(start + len(chunk), len(examples))


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str], **options: bool) -> Any:
    return tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # no warning for texts above the model's length, which are cut later
        **options,
    )


def _get_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return () if bos is None else (bos,), () if eos is None else (eos,)
