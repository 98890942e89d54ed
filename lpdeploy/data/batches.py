"""A corpus as rows of tokens, the rows of each step, and rows as tensors."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from lpdeploy.data.sources import Corpus, Example
from lpdeploy.errors import DataError

IGNORED = -100
"""Label of a token that is not trained on."""
_EXAMPLES_A_CALL = 1000

Progress = Callable[[int, int], None]
"""Called with the number that is done and the number of all."""


@dataclass(frozen=True, eq=False)
class TokenDataset:
    """Rows of tokens in one flat array: 4 bytes per token, and no Python objects.

    Attributes:
        tokens: The tokens of all rows, shape (N,).
        offsets: Row i is ``tokens[offsets[i]:offsets[i + 1]]``, shape (rows + 1,).
        prompt_lengths: Number of leading tokens of each row that are not trained on, shape (rows,).
        num_dropped: Number of examples without a row, because their prompts fill ``seq_len``.
    """

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    prompt_lengths: NDArray[np.int32]
    num_dropped: int = 0

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.prompt_lengths)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens of each row, shape (rows,)."""
        return np.diff(self.offsets)

    @cached_property
    def sha256(self) -> str:
        """Hash of everything that a model is trained on."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.offsets, self.prompt_lengths):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def select(self, rows: Sequence[int]) -> "TokenDataset":
        """Copy some rows, in their order."""
        parts = [self.tokens[self.offsets[row] : self.offsets[row + 1]] for row in rows]
        offsets = np.concatenate([[0], np.cumsum(self.lengths[list(rows)])]).astype(np.int64)
        prompts = self.prompt_lengths[list(rows)]
        return TokenDataset(np.concatenate(parts), offsets, prompts)

    def collate(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Stack rows, padded on the right to the longest.

        Args:
            indices: B rows; at least one.

        Returns:
            ``input_ids`` (0 at padding), ``labels`` (not shifted; -100 at padding and at prompts)
            and ``attention_mask``, each shape (B, T), int64.

        Raises:
            ValueError: ``indices`` is empty.
        """
        if not indices:
            raise ValueError("indices must name at least one row")
        rows, labels = [], []
        for index in indices:
            tokens = self.tokens[self.offsets[index] : self.offsets[index + 1]]
            rows.append(torch.from_numpy(tokens.astype(np.int64)))
            labels.append(rows[-1].clone())
            labels[-1][: self.prompt_lengths[index]] = IGNORED
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
    on_progress: Progress | None = None,
) -> TokenDataset:
    """Tokenize a corpus into rows to train on.

    Plain text is packed: documents, each with its bos and eos, are joined and cut into rows of
    exactly ``seq_len``. The rest is dropped. Each instruction pair is one row: bos, prompt,
    response, eos, truncated at ``seq_len``.

    Args:
        corpus: Plain text or instruction pairs.
        tokenizer: A transformers tokenizer. Its bos and eos, if it has them, are always added.
        seq_len: Largest number of tokens per row; at least 2.
        train_on_prompt: Whether prompts have labels as well.
        on_progress: Called with (examples tokenized, all examples).

    Raises:
        ValueError: ``seq_len`` is below 2.
        DataError: There is less text than one row, or no response begins within ``seq_len``.
    """
    if seq_len < 2:
        raise ValueError(f"seq_len is {seq_len}; a row needs 2 tokens to predict one")
    if corpus.is_instruction:
        return _build_pairs(
            corpus,
            tokenizer,
            seq_len=seq_len,
            train_on_prompt=train_on_prompt,
            on_progress=on_progress,
        )
    tokens = build_token_stream(corpus, tokenizer, on_progress=on_progress)
    rows = len(tokens) // seq_len
    if rows == 0:
        raise DataError(
            f"'{corpus.source}' holds {len(tokens)} tokens, but one row of `seq_len` {seq_len} "
            f"needs {seq_len}. Give more text, or a smaller `seq_len`."
        )
    return TokenDataset(
        tokens=tokens[: rows * seq_len],
        offsets=np.arange(rows + 1, dtype=np.int64) * seq_len,
        prompt_lengths=np.zeros(rows, dtype=np.int32),
    )


def build_token_stream(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, *, on_progress: Progress | None = None
) -> NDArray[np.int32]:
    """Join all documents, or prompts with responses, each as bos, tokens, eos; shape (N,)."""
    bos, eos = _get_ends(tokenizer)
    pieces: list[NDArray[np.int32]] = []
    for examples in _iterate_chunks(corpus.examples, on_progress):
        encoded = _encode([example.prompt + example.text for example in examples], tokenizer)
        pieces.append(np.concatenate([part for ids in encoded for part in (bos, ids, eos)]))
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


def _build_pairs(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    train_on_prompt: bool,
    on_progress: Progress | None,
) -> TokenDataset:
    bos, eos = _get_ends(tokenizer)
    pieces: list[NDArray[np.int32]] = []
    lengths: list[int] = []
    prompt_lengths: list[int] = []
    for examples in _iterate_chunks(corpus.examples, on_progress):
        rows = []
        prompts = _encode([example.prompt for example in examples], tokenizer)
        pairs = _encode([example.prompt + example.text for example in examples], tokenizer)
        for prompt, pair in zip(prompts, pairs, strict=True):
            num_prompt = len(bos) + _count_common(prompt, pair)
            if num_prompt < min(len(bos) + len(pair), seq_len):
                rows.append(np.concatenate([bos, pair, eos])[:seq_len])
                prompt_lengths.append(0 if train_on_prompt else num_prompt)
        lengths += [len(row) for row in rows]
        pieces += [np.concatenate(rows)] if rows else []
    if not lengths:
        raise DataError(
            f"No response of '{corpus.source}' begins within `seq_len` {seq_len}: its prompts are "
            "longer. Use a larger `seq_len`."
        )
    return TokenDataset(
        tokens=np.concatenate(pieces),
        offsets=np.cumsum([0, *lengths], dtype=np.int64),
        prompt_lengths=np.array(prompt_lengths, dtype=np.int32),
        num_dropped=len(corpus.examples) - len(lengths),
    )


def _count_common(prompt: NDArray[np.int32], pair: NDArray[np.int32]) -> int:
    # The pair is encoded as one text, since some tokenizers put a space before each text. A token
    # that spans the border then differs from the prompt's own and is trained on.
    length = min(len(prompt), len(pair))
    return int(np.logical_and.accumulate(prompt[:length] == pair[:length]).sum())


def _iterate_chunks(
    examples: list[Example], on_progress: Progress | None
) -> Iterator[list[Example]]:
    for start in range(0, len(examples), _EXAMPLES_A_CALL):
        chunk = examples[start : start + _EXAMPLES_A_CALL]
        yield chunk
        if on_progress is not None:
            on_progress(start + len(chunk), len(examples))


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[NDArray[np.int32]]:
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # no warning for texts above the model's length, which are cut later
    )
    return [np.array(ids, dtype=np.int32) for ids in encoded["input_ids"]]


def _get_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    bos, eos = (
        np.array([] if token is None else [token], dtype=np.int32)
        for token in (tokenizer.bos_token_id, tokenizer.eos_token_id)
    )
    return bos, eos
