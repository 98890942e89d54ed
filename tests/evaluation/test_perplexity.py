"""Perplexity against plain loops over single positions, and the figure of the real model."""

import copy
import math
import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lpdeploy.data.rows import ASSISTANT, USER, Example, Message
from lpdeploy.data.sources import Corpus, load_corpus
from lpdeploy.engines.runner import Output
from lpdeploy.errors import DataError, LpdeployError, NonFiniteError
from lpdeploy.evaluation import perplexity as module
from lpdeploy.evaluation.perplexity import compute_perplexity
from lpdeploy.models.loading import load_model, load_tokenizer

SHARED = Path(__file__).parents[3] / "shared"
MODEL = SHARED / "models" / "tinystories-llama-6M"
VALID = SHARED / "data" / "tinystories" / "valid.txt"
real = pytest.mark.skipif(
    not (MODEL.is_dir() and VALID.is_file()), reason=f"no real model and data: {SHARED} is absent"
)

DOCUMENTS = ["the cat sat on the mat", "what did the dog say?", "café"]
BOS, EOS = 0, 1


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte."""
    alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def chat_tokenizer(tokenizer):
    """The same, with a template that ends each answer with an eos."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "<s>{% for turn in messages %}{{ turn['content'] }}"
        "{% if turn['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    )
    return tokenizer


def chats(said):
    turns = [(Message(USER, prompt), Message(ASSISTANT, answer)) for prompt, answer in said]
    return Corpus("pairs.jsonl", [Example(messages=messages) for messages in turns])


class TableRunner:
    """Logits from a random table and all tokens so far, so that context and its lack show."""

    name = "torch"
    precision = "fp32"
    vocab_size = 258
    max_positions = 64

    def __init__(self, scale=1.0):
        generator = torch.Generator().manual_seed(0)
        self.table = scale * torch.randn(258, 258, generator=generator)
        self.shapes = []

    def forward(self, input_ids, *, attention_mask, past=None):  # noqa: ARG002
        assert attention_mask.shape == input_ids.shape
        assert attention_mask.all()
        self.shapes.append(tuple(input_ids.shape))
        counts = torch.arange(1, input_ids.shape[1] + 1).view(1, -1, 1)
        return Output(self.table[input_ids].cumsum(dim=1) / counts.sqrt(), None)


def corpus(documents=DOCUMENTS):
    return Corpus("some.txt", [Example(text) for text in documents])


def expected_loss(runner, segments):
    """Sum over single positions, each from its own forward pass over what stands before it."""
    total = 0.0
    for segment in segments:
        for place in range(1, len(segment)):
            before = torch.tensor([segment[:place]])
            logits = runner.forward(before, attention_mask=torch.ones_like(before)).logits
            scores = [float(score) for score in logits[0, -1]]
            top = max(scores)
            log_sum = top + math.log(sum(math.exp(score - top) for score in scores))
            total += log_sum - scores[segment[place]]
    return total


def flat(documents, tokenizer):
    stream = []
    for text in documents:
        stream += [BOS, *tokenizer.encode(text, add_special_tokens=False), EOS]
    return stream


class TestAgainstALoop:
    @pytest.mark.parametrize("batch_size", [1, 2, 100])
    def test_segments(self, tokenizer, batch_size):
        stream = flat(DOCUMENTS, tokenizer)
        assert len(stream) % 10 != 0  # something is left over
        segments = [stream[i : i + 10] for i in range(0, len(stream) - 9, 10)]
        found = compute_perplexity(
            TableRunner(), corpus(), tokenizer, seq_len=10, batch_size=batch_size
        )
        mean = expected_loss(TableRunner(), segments) / (9 * len(segments))
        num_bytes = sum(len(text.encode("utf-8")) for text in DOCUMENTS)
        # fp32 sums of some 50 losses of about 6.
        assert found.perplexity == pytest.approx(math.exp(mean), rel=1e-5)
        assert found.bits_per_byte == pytest.approx(
            mean / math.log(2) * len(stream) / num_bytes, rel=1e-5
        )
        assert found.tokens == 9 * len(segments)

    @pytest.mark.parametrize("number", [1, 3, 10**6])
    def test_the_first_segments_alone(self, tokenizer, number):
        stream = flat(DOCUMENTS, tokenizer)
        segments = [stream[i : i + 10] for i in range(0, len(stream) - 9, 10)][:number]
        found = compute_perplexity(
            TableRunner(), corpus(), tokenizer, seq_len=10, max_segments=number
        )
        mean = expected_loss(TableRunner(), segments) / (9 * len(segments))
        assert found.perplexity == pytest.approx(math.exp(mean), rel=1e-5)
        assert found.tokens == 9 * len(segments)

    def test_bits_per_byte_of_a_part_do_not_depend_on_the_rest(self, tokenizer):
        part = {"seq_len": 8, "max_segments": 3}
        first = "say cat and dog " * 9
        alone = compute_perplexity(TableRunner(), corpus([first]), tokenizer, **part)
        longer = compute_perplexity(TableRunner(), corpus([first, "é" * 500]), tokenizer, **part)
        assert longer == alone
        # A token is a byte there, but for the bos.
        assert alone.bits_per_byte == pytest.approx(math.log2(alone.perplexity) * 24 / 23)

    def test_chunks_of_positions(self, tokenizer, monkeypatch):
        whole = compute_perplexity(TableRunner(), corpus(), tokenizer, seq_len=10)
        monkeypatch.setattr(module, "_POSITIONS_AT_ONCE", 7)
        pieces = compute_perplexity(TableRunner(), corpus(), tokenizer, seq_len=10)
        assert pieces.perplexity == pytest.approx(whole.perplexity, rel=1e-6)  # order of the sum

    def test_only_segment_may_be_incomplete(self, tokenizer):
        stream = flat(["the cat"], tokenizer)
        found = compute_perplexity(TableRunner(), corpus(["the cat"]), tokenizer, seq_len=64)
        mean = expected_loss(TableRunner(), [stream]) / (len(stream) - 1)
        assert found.perplexity == pytest.approx(math.exp(mean), rel=1e-5)
        assert found.tokens == len(stream) - 1

    @pytest.mark.parametrize("number", [None, 2])
    def test_conversations_count_by_their_answers(self, chat_tokenizer, number):
        said = [("say cat: ", "cat"), ("and now a dog: ", "dog!"), ("twice: ", "catcat")]
        found = compute_perplexity(
            TableRunner(), chats(said), chat_tokenizer, seq_len=30, max_segments=number
        )
        total, num_tokens, num_bytes = 0.0, 0, 0
        for prompt, answer in said[:number]:
            ids = [BOS, *chat_tokenizer.encode(prompt + answer, add_special_tokens=False), EOS]
            # One token a byte, and the eos that ends the turn.
            first = 1 + len(prompt)
            total += expected_loss(TableRunner(), [ids]) - expected_loss(
                TableRunner(), [ids[:first]]
            )
            num_tokens += len(answer) + 1
            num_bytes += len(answer)
        mean = total / num_tokens
        assert found.tokens == num_tokens
        assert found.perplexity == pytest.approx(math.exp(mean), rel=1e-5)
        assert found.bits_per_byte == pytest.approx(
            mean / math.log(2) * num_tokens / num_bytes, rel=1e-5
        )

    def test_what_does_not_fit_of_an_answer_is_left_out(self, chat_tokenizer, caplog):
        said = [("say cat: ", "cat and dog"), ("a prompt that is longer: ", "cat")]
        found = compute_perplexity(TableRunner(), chats(said), chat_tokenizer, seq_len=15)
        ids = [BOS, *chat_tokenizer.encode("say cat: cat and dog", add_special_tokens=False)][:15]
        total = expected_loss(TableRunner(), [ids]) - expected_loss(TableRunner(), [ids[:10]])
        assert found.tokens == 5
        assert found.perplexity == pytest.approx(math.exp(total / 5), rel=1e-5)
        said = "longer than `seq_len` 15 .* Without any answer: 1; without the end of one: 1"
        assert re.search(said, caplog.text)

    def test_answers_that_all_begin_too_late_are_refused(self, chat_tokenizer):
        with pytest.raises(DataError, match=r"No answer of 'pairs\.jsonl' begins within"):
            compute_perplexity(
                TableRunner(), chats([("say cat: ", "cat")]), chat_tokenizer, seq_len=8
            )

    def test_uniform_model(self, tokenizer):
        """A model that knows nothing has the vocabulary as perplexity, and 8 bits a byte or so."""
        found = compute_perplexity(TableRunner(scale=0.0), corpus(), tokenizer, seq_len=10)
        assert found.perplexity == pytest.approx(258, rel=1e-5)
        num_bytes = sum(len(text.encode()) for text in DOCUMENTS)
        # One token a byte, and a bos and an eos for each document.
        expected = math.log2(258) * (num_bytes + 2 * len(DOCUMENTS)) / num_bytes
        assert found.bits_per_byte == pytest.approx(expected, rel=1e-5)


class TestWork:
    def test_batches_and_progress(self, tokenizer):
        runner, told = TableRunner(), []
        compute_perplexity(
            runner,
            corpus(),
            tokenizer,
            seq_len=10,
            batch_size=2,
            on_progress=lambda *now: told.append(now),
        )
        assert runner.shapes == [(2, 10), (2, 10), (1, 10)]
        assert told == [(2, 5), (4, 5), (5, 5)]

    def test_half_precision_logits_are_scored_in_fp32(self, tokenizer):
        class HalfRunner(TableRunner):
            widen = False

            def forward(self, input_ids, *, attention_mask, past=None):  # noqa: ARG002
                logits = super().forward(input_ids, attention_mask=attention_mask).logits.half()
                return Output(logits.float() if self.widen else logits, None)

        half, wide = HalfRunner(), HalfRunner()
        wide.widen = True
        # The same to the last bit: only where the widening happens differs.
        assert compute_perplexity(half, corpus(), tokenizer, seq_len=10) == compute_perplexity(
            wide, corpus(), tokenizer, seq_len=10
        )


class TestErrors:
    def test_too_few_positions(self, tokenizer):
        with pytest.raises(
            LpdeployError, match=r"The model has 64 positions; use `seq_len=64` or less\."
        ):
            compute_perplexity(TableRunner(), corpus(), tokenizer, seq_len=65)

    def test_seq_len_of_one(self, tokenizer):
        with pytest.raises(ValueError, match="seq_len is 1; a segment needs 2 tokens"):
            compute_perplexity(TableRunner(), corpus(), tokenizer, seq_len=1)

    def test_one_token(self):
        backend = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
        bare = PreTrainedTokenizerFast(tokenizer_object=backend)
        with pytest.raises(
            DataError, match=r"'some\.txt' holds 1 token, which leaves none to predict\. Give more"
        ):
            compute_perplexity(TableRunner(), corpus(["a"]), bare, seq_len=8)

    @pytest.mark.parametrize("scale", [math.nan, math.inf])
    def test_not_a_number(self, tokenizer, scale):
        with pytest.raises(
            NonFiniteError,
            match=r"The loss of the fp32 model on torch is nan at segment 2 of 5\. Evaluate in "
            r"fp32, or check that the weights are whole\.",
        ):
            compute_perplexity(TableRunner(scale), corpus(), tokenizer, seq_len=10, batch_size=2)

    def test_finite_loss_of_no_finite_perplexity(self, tokenizer):
        with pytest.raises(NonFiniteError, match=r"model on torch is \d{4,} a token\. Evaluate in"):
            compute_perplexity(TableRunner(scale=1e4), corpus(), tokenizer, seq_len=10)


class ModelRunner:
    """The least a Runner needs over a transformers model."""

    name = "torch"
    precision = "fp32"

    def __init__(self, model):
        self.model = model
        self.vocab_size = model.config.vocab_size
        self.max_positions = model.config.max_position_embeddings

    def forward(self, input_ids, *, attention_mask, past=None):  # noqa: ARG002
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return Output(output.logits, None)


@real
@pytest.mark.real
class TestRealModel:
    @pytest.fixture(scope="class")
    def loaded(self):
        model = load_model(MODEL)
        return model, load_tokenizer(MODEL, model.config)

    def test_slice_against_a_direct_computation(self, loaded):
        model, tokenizer = loaded
        few = Corpus("slice", load_corpus(str(VALID)).examples[:6])
        stream = []
        for text in VALID.read_text(encoding="utf-8").split("\n<|endoftext|>\n")[:6]:
            stream += [1, *tokenizer.encode(text, add_special_tokens=False), 2]
        losses = []
        for start in range(0, len(stream) - 127, 128):
            segment = torch.tensor([stream[start : start + 128]])
            with torch.no_grad():
                logits = model(segment, use_cache=False).logits[0].double()
            for place in range(127):
                row = logits[place]
                losses.append(float(row.logsumexp(dim=0) - row[segment[0, place + 1]]))
        found = compute_perplexity(ModelRunner(model), few, tokenizer, seq_len=128)
        assert found.tokens == len(losses)
        # fp32 in the log-softmax and its sum, and matmuls of another batch size.
        assert found.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)

    @pytest.mark.slow
    def test_published_figure(self, loaded):
        model, tokenizer = loaded
        found = compute_perplexity(
            ModelRunner(model), load_corpus(str(VALID)), tokenizer, seq_len=256
        )
        # ../shared/README.md says 15.76; fp32 differs between machines in the sixth digit.
        assert found.perplexity == pytest.approx(15.76306, abs=1e-4)
        assert found.tokens == 202 * 255
        assert 1.0 < found.bits_per_byte < 1.2
