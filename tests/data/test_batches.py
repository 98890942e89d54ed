"""Rows against plain loops over the tokenizer's own encode, batches against their definition."""

import copy
import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from lpdeploy.data import batches
from lpdeploy.data.batches import (
    build_token_dataset,
    build_token_stream,
    estimate_padding,
    list_batch,
    split_batch,
)
from lpdeploy.data.rows import ASSISTANT, USER, Example, Message
from lpdeploy.data.sources import Corpus
from lpdeploy.errors import DataError

DOCUMENTS = ["the cat sat", "on the mat. what did the dog say?", "naïve café ☕", "a"]
PAIRS = [
    ("Task: say cat\nAnswer:\n", "the cat sat on the mat"),
    ("Task: say dog twice, please\nAnswer:\n", "dog dog"),
    ("Q\n", "\n\nthat"),
]
BOS, EOS = 0, 1


def plain(documents=DOCUMENTS):
    return Corpus("some.txt", [Example(text) for text in documents])


def instruct(pairs=PAIRS):
    turns = [(Message(USER, prompt), Message(ASSISTANT, answer)) for prompt, answer in pairs]
    return Corpus("pairs.jsonl", [Example(messages=messages) for messages in turns])


@pytest.fixture
def joining(tokenizer):
    """The tokenizer with a template that only joins what was said, between bos and eos."""
    return with_template(tokenizer)


def with_template(tokenizer):
    copied = copy.deepcopy(tokenizer)
    copied.chat_template = (
        "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
        "{{ '' if add_generation_prompt else eos_token }}"
    )
    return copied


def rows_of(dataset):
    return [
        dataset.tokens[start:stop].tolist()
        for start, stop in zip(dataset.offsets, dataset.offsets[1:], strict=False)
    ]


class TestPlainText:
    def test_tokenizer_alone_adds_a_bos(self, tokenizer):
        assert tokenizer("the")["input_ids"][0] == BOS  # else the next test proves little

    @pytest.mark.parametrize("seq_len", [2, 5, 7])
    def test_packed(self, tokenizer, seq_len):
        stream = []
        for text in DOCUMENTS:
            stream += [BOS, *tokenizer.encode(text, add_special_tokens=False), EOS]
        expected = [stream[i : i + seq_len] for i in range(0, len(stream), seq_len)]
        if len(expected[-1]) < seq_len:
            expected.pop()
        dataset = build_token_dataset(plain(), tokenizer, seq_len=seq_len)
        assert rows_of(dataset) == expected
        assert len(dataset) == len(expected)
        assert build_token_stream(plain(), tokenizer).tolist() == stream

    def test_tokenizer_without_ends(self, bare_tokenizer):
        stream = [
            i for text in DOCUMENTS for i in bare_tokenizer.encode(text, add_special_tokens=False)
        ]
        assert build_token_stream(plain(), bare_tokenizer).tolist() == stream
        assert not {BOS, EOS} & set(stream)

    def test_many_documents(self, tokenizer, monkeypatch):
        whole = build_token_stream(plain(DOCUMENTS * 5), tokenizer)
        monkeypatch.setattr(batches, "_EXAMPLES_A_CALL", 3)
        told = []
        pieces = build_token_stream(
            plain(DOCUMENTS * 5), tokenizer, on_progress=lambda *now: told.append(now)
        )
        assert pieces.tolist() == whole.tolist()
        assert told == [(3, 20), (6, 20), (9, 20), (12, 20), (15, 20), (18, 20), (20, 20)]

    def test_every_token_is_trained_on(self, tokenizer):
        dataset = build_token_dataset(plain(), tokenizer, seq_len=5)
        batch = dataset.collate(range(len(dataset)))
        assert torch.equal(batch["labels"], batch["input_ids"])
        assert batch["attention_mask"].all()

    def test_stored_compactly(self, tokenizer):
        dataset = build_token_dataset(plain(), tokenizer, seq_len=5)
        assert dataset.tokens.dtype == np.int32
        assert dataset.tokens.shape == (5 * len(dataset),)

    def test_exactly_one_row(self, tokenizer):
        length = len(build_token_stream(plain(), tokenizer))
        assert len(build_token_dataset(plain(), tokenizer, seq_len=length)) == 1

    def test_less_than_one_row(self, tokenizer):
        length = len(build_token_stream(plain(), tokenizer))
        with pytest.raises(
            DataError,
            match=rf"'some\.txt' holds {length} tokens, but one row of `seq_len` {length + 1} "
            rf"needs {length + 1}\. Give more text, or a smaller `seq_len`\.",
        ):
            build_token_dataset(plain(), tokenizer, seq_len=length + 1)

    def test_seq_len_of_one(self, tokenizer):
        with pytest.raises(ValueError, match="seq_len is 1; a row needs 2 tokens"):
            build_token_dataset(plain(), tokenizer, seq_len=1)


class TestInstructionPairs:
    @pytest.mark.parametrize("seq_len", [512, 24])
    def test_one_row_a_pair(self, joining, seq_len):
        dataset = build_token_dataset(instruct(), joining, seq_len=seq_len)
        batch = dataset.collate(range(len(dataset)))
        place = 0
        for prompt, response in PAIRS:
            ids = joining.encode(prompt + response, add_special_tokens=False)
            # Independent of how the border is found: a token is the prompt's where the text up to
            # and with it is a beginning of the prompt.
            in_prompt = [prompt.startswith(joining.decode(ids[: i + 1])) for i in range(len(ids))]
            row, labels = [BOS, *ids, EOS][:seq_len], [-100, *ids, EOS][:seq_len]
            labels = [
                -100 if 0 < i <= len(ids) and in_prompt[i - 1] else label
                for i, label in enumerate(labels)
            ]
            if all(label == -100 for label in labels):
                continue
            padding = batch["input_ids"].shape[1] - len(row)
            assert batch["input_ids"][place].tolist() == row + [0] * padding
            assert batch["labels"][place].tolist() == labels + [-100] * padding
            assert batch["attention_mask"][place].tolist() == [1] * len(row) + [0] * padding
            place += 1
        assert len(dataset) == place
        assert dataset.num_dropped == len(PAIRS) - place

    def test_truncation_really_drops_in_the_test_above(self, joining):
        dataset = build_token_dataset(instruct(), joining, seq_len=24)
        assert dataset.num_dropped > 0
        assert max(np.diff(dataset.offsets)) == 24

    def test_rows_that_lack_the_end_of_an_answer_are_counted(self, joining):
        whole = build_token_dataset(instruct(), joining, seq_len=512)
        assert whole.num_cut == 0
        longest = max(whole.lengths)  # the last token of a row ends its answer
        assert build_token_dataset(instruct(), joining, seq_len=longest).num_cut == 0
        cut = build_token_dataset(instruct(), joining, seq_len=longest - 1)
        assert cut.num_cut == sum(whole.lengths == longest)
        assert (len(cut), cut.num_dropped) == (len(whole), 0)

    def test_border_at_one_token_of_the_response(self, joining):
        prompt, response = PAIRS[0]
        num_prompt = 1 + len(joining.encode(prompt, add_special_tokens=False))
        corpus = instruct([PAIRS[0]])
        batch = build_token_dataset(corpus, joining, seq_len=num_prompt + 1).collate([0])
        first = joining.encode(response, add_special_tokens=False)[0]
        assert batch["labels"].tolist() == [[-100] * num_prompt + [first]]
        with pytest.raises(
            DataError,
            match=rf"No answer of 'pairs\.jsonl' begins within `seq_len` {num_prompt}: its "
            r"prompts are longer\. Use a larger `seq_len`\.",
        ):
            build_token_dataset(corpus, joining, seq_len=num_prompt)

    def test_token_across_the_border_is_trained_on(self, joining):
        prompt, response = "say th", "e cat"
        assert joining.tokenize(prompt + response)[-2] == "Ġthe"
        batch = build_token_dataset(instruct([(prompt, response)]), joining, seq_len=64).collate(
            [0]
        )
        trained = batch["labels"][0][batch["labels"][0] != -100]
        assert joining.decode(trained) == " the cat</s>"

    def test_train_on_prompt(self, joining):
        dataset = build_token_dataset(instruct(), joining, seq_len=512, train_on_prompt=True)
        batch = dataset.collate([0, 1, 2])
        kept = batch["attention_mask"].bool()
        assert torch.equal(batch["labels"][kept], batch["input_ids"][kept])
        assert (batch["labels"][~kept] == -100).all()

    def test_without_ends(self, bare_tokenizer):
        prompt, response = PAIRS[0]
        bare = with_template(bare_tokenizer)
        dataset = build_token_dataset(instruct([PAIRS[0]]), bare, seq_len=512)
        labels = dataset.collate([0])["labels"][0]
        assert bare.decode(labels[labels != -100]) == response
        assert bare.decode(dataset.tokens) == prompt + response

    def test_chunks_do_not_matter(self, joining, monkeypatch):
        whole = build_token_dataset(instruct(PAIRS * 4), joining, seq_len=24)
        monkeypatch.setattr(batches, "_EXAMPLES_A_CALL", 1)  # some chunks are dropped whole
        pieces = build_token_dataset(instruct(PAIRS * 4), joining, seq_len=24)
        assert rows_of(pieces) == rows_of(whole)
        assert pieces.labelled.tolist() == whole.labelled.tolist()


class TestCollate:
    def test_pads_to_the_longest_of_the_batch_only(self, joining):
        dataset = build_token_dataset(instruct(), joining, seq_len=512)
        lengths = np.diff(dataset.offsets)
        assert len(set(lengths.tolist())) == 3
        for indices in ([0], [2, 1], [1, 1, 2]):
            batch = dataset.collate(indices)
            for tensor in batch.values():
                assert tensor.shape == (len(indices), max(lengths[i] for i in indices))
                assert tensor.dtype == torch.int64
        assert set(batch) == {"input_ids", "labels", "attention_mask"}

    def test_rows_stand_in_the_asked_order(self, joining):
        dataset = build_token_dataset(plain(), joining, seq_len=5)
        expected = rows_of(dataset)
        assert dataset.collate([2, 0, 2])["input_ids"].tolist() == [
            expected[2],
            expected[0],
            expected[2],
        ]

    def test_no_rows(self, joining):
        dataset = build_token_dataset(plain(), joining, seq_len=5)
        with pytest.raises(ValueError, match="at least one row"):
            dataset.collate([])


class TestListBatch:
    @pytest.mark.parametrize(
        ("num_rows", "batch_size"), [(10, 4), (10, 10), (3, 8), (1, 5), (7, 1)]
    )
    def test_each_epoch_sees_each_row_once(self, num_rows, batch_size):
        stream = []
        for step in range(3 * num_rows):
            batch = list_batch(num_rows, step=step, batch_size=batch_size, seed=0)
            assert len(batch) == batch_size
            assert all(type(row) is int for row in batch)
            stream += batch
        for start in range(0, len(stream) - num_rows + 1, num_rows):
            assert Counter(stream[start : start + num_rows]) == Counter(range(num_rows))

    def test_only_seed_and_step_decide(self):
        steps = [list_batch(100, step=step, batch_size=32, seed=5) for step in range(8)]
        for step in (7, 2, 4):
            batches._permute.cache_clear()
            assert list_batch(100, step=step, batch_size=32, seed=5) == steps[step]

    def test_epochs_and_seeds_differ(self):
        first, second = (list_batch(50, step=step, batch_size=50, seed=1) for step in (0, 1))
        assert first != second
        assert first != list_batch(50, step=0, batch_size=50, seed=2)
        assert first != list(range(50))

    @pytest.mark.parametrize(
        "wrong", [{"num_rows": 0}, {"batch_size": 0}, {"step": -1}, {"seed": -1}]
    )
    def test_wrong_arguments(self, wrong):
        given = {"num_rows": 3, "step": 0, "batch_size": 2, "seed": 0, **wrong}
        with pytest.raises(ValueError, match=r"must be at least 1, step .* at least 0"):
            list_batch(given.pop("num_rows"), **given)


def count_computed(micros, lengths):
    return sum(max(lengths[row] for row in micro) for micro in micros for _ in micro)


class TestSplitBatch:
    LENGTHS = np.array([3, 9, 4, 4, 9, 2, 7])

    def test_longest_first_and_equals_in_their_order(self):
        micros = split_batch([6, 4, 2, 0, 1, 3, 5], self.LENGTHS, micro_batch_size=2)
        assert micros == [[4, 1], [6, 2], [3, 0], [5]]
        assert all(type(row) is int for micro in micros for row in micro)

    def test_rows_of_one_length_stay_as_they_are(self):
        rows = [5, 1, 4, 0, 2, 3]
        micros = split_batch(rows, np.full(6, 8), micro_batch_size=4)
        assert micros == [[5, 1, 4, 0], [2, 3]]

    def test_a_row_may_come_twice(self):
        assert split_batch([0, 1, 0], np.array([2, 5]), micro_batch_size=2) == [[1, 0], [0]]

    @pytest.mark.parametrize("size", [1, 2, 3])
    def test_no_split_pads_less(self, size):
        rng = np.random.default_rng(0)
        for _ in range(5):
            lengths = rng.integers(1, 20, size=6)
            found = count_computed(split_batch(range(6), lengths, micro_batch_size=size), lengths)
            for order in itertools.permutations(range(6)):
                micros = [order[i : i + size] for i in range(0, 6, size)]
                assert found <= count_computed(micros, lengths)


class TestEstimatePadding:
    def test_share_of_what_is_computed(self):
        lengths = np.array([1, 2, 3, 10])
        # Whatever the order, a step of all rows is split into (10, 3), (2, 1).
        share = estimate_padding(lengths, batch_size=4, micro_batch_size=2, steps=7, seed=0)
        assert share == pytest.approx(1 - 16 / 24)
        share = estimate_padding(lengths, batch_size=4, micro_batch_size=4, steps=1, seed=0)
        assert share == pytest.approx(1 - 16 / 40)
        assert estimate_padding(lengths, batch_size=4, micro_batch_size=1, steps=1, seed=0) == 0

    @pytest.mark.parametrize("steps", [0, 3])
    def test_packed_text_has_none(self, steps):
        lengths = np.full(5, 8)
        options = {"batch_size": 4, "micro_batch_size": 2, "steps": steps, "seed": 0}
        assert estimate_padding(lengths, **options) == 0

    def test_no_steps_have_none(self):
        options = {"batch_size": 4, "micro_batch_size": 2, "steps": 0, "seed": 0}
        assert estimate_padding(np.array([1, 2]), **options) == 0
