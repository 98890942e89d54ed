"""Conversations as text: against templates written out by hand, and against transformers' masks."""

import copy
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lpdeploy.data.batches import build_token_dataset
from lpdeploy.data.chat import INSTRUCTION_TEMPLATE, find_chat_template, render_chat
from lpdeploy.data.rows import Example, Message
from lpdeploy.data.sources import Corpus
from lpdeploy.errors import DataError

TURNS = (
    Message("system", "Be {brief}."),
    Message("user", "Say hi."),
    Message("assistant", "hi"),
    Message("user", "Again!"),
    Message("assistant", "hi again"),
)
CHATML = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
LLAMA_2 = (  # no prompt for an answer: it simply follows
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
HIDES_EARLIER_ANSWERS = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{{ message['content'] if loop.last or message['role'] == 'user' else '...' }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
MASKED = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.fixture
def chatty(tokenizer):
    def make(template):
        copied = copy.deepcopy(tokenizer)
        copied.chat_template = template
        return copied

    return make


def find_answers(messages, tokenizer, template):
    rendered = render_chat(messages, tokenizer, template)
    return rendered.text, [rendered.text[first:last] for first, last in rendered.answers]


class TestRendering:
    def test_own_template(self, tokenizer):
        text, answers = find_answers(TURNS, tokenizer, CHATML)
        assert text == (
            "<|system|>\nBe {brief}.</s>\n<|user|>\nSay hi.</s>\n<|assistant|>\nhi</s>\n"
            "<|user|>\nAgain!</s>\n<|assistant|>\nhi again</s>\n"
        )
        assert answers == ["hi</s>\n", "hi again</s>\n"]

    def test_template_without_a_prompt_for_answers(self, tokenizer):
        text, answers = find_answers(TURNS[1:], tokenizer, LLAMA_2)
        assert text == "<s>[INST] Say hi. [/INST] hi</s><s>[INST] Again! [/INST] hi again</s>"
        assert answers == [" hi</s>", " hi again</s>"]

    def test_fixed_template(self, tokenizer):
        text, answers = find_answers(TURNS, tokenizer, INSTRUCTION_TEMPLATE)
        assert text == (
            "<s>A task is given below. Answer it.\n\nBe {brief}.\n\n"
            "### Instruction:\nSay hi.\n\n### Response:\nhi</s>\n\n"
            "### Instruction:\nAgain!\n\n### Response:\nhi again</s>"
        )
        assert answers == ["hi</s>", "hi again</s>"]

    def test_fixed_template_without_special_tokens(self, bare_tokenizer):
        text, answers = find_answers(TURNS[1:3], bare_tokenizer, INSTRUCTION_TEMPLATE)
        assert text == (
            "A task is given below. Answer it.\n\n### Instruction:\nSay hi.\n\n### Response:\nhi"
        )
        assert answers == ["hi"]

    def test_earlier_answers_that_are_written_differently(self, tokenizer):
        assert find_answers(TURNS[1:3], tokenizer, HIDES_EARLIER_ANSWERS)[1] == ["hi\n"]
        with pytest.raises(
            DataError,
            match=r"writes a turn differently once the conversation goes on, so answer 1 of the "
            r"conversation \(user, assistant, user, assistant\) that begins with 'Say hi\.'",
        ):
            find_answers(TURNS[1:], tokenizer, HIDES_EARLIER_ANSWERS)

    @pytest.mark.parametrize(
        "template",
        [
            "{{ raise_exception('Roles must alternate.') }}",
            "{% for message in messages %}",
            "{{ messages[9]['content'] }}",
            "{{ 1 + 'a' }}",
            "{{ messages.append(1) }}",  # of the sandbox
        ],
    )
    def test_template_that_fails(self, tokenizer, template):
        with pytest.raises(
            DataError,
            match=r"^The chat template fails for the conversation \(user, assistant\) that begins "
            r"with 'Say hi\.' \(.+\)\. Correct the conversation, or use `prompt_format=",
        ):
            find_answers(TURNS[1:3], tokenizer, template)


class TestChoice:
    def test_own_template_wins(self, chatty):
        assert find_chat_template(chatty(CHATML)) == CHATML
        assert find_chat_template(chatty(CHATML), "chat-template") == CHATML
        assert find_chat_template(chatty(CHATML), "instruction") == INSTRUCTION_TEMPLATE

    def test_default_of_several(self, chatty):
        several = {"default": CHATML, "tool_use": LLAMA_2}
        assert find_chat_template(chatty(several)) == CHATML

    def test_none(self, tokenizer):
        assert find_chat_template(tokenizer) == INSTRUCTION_TEMPLATE
        with pytest.raises(DataError, match=r"The tokenizer has no chat template\. Add a chat_te"):
            find_chat_template(tokenizer, "chat-template")


class TestTokens:
    def build(self, tokenizer, messages=TURNS, **options):
        corpus = Corpus("chats.jsonl", [Example(messages=messages)])
        return build_token_dataset(corpus, tokenizer, **{"seq_len": 512, **options})

    def test_only_answers_are_trained_on_as_transformers_marks_them(self, chatty):
        tokenizer = chatty(MASKED)
        dataset = self.build(tokenizer)
        expected = tokenizer.apply_chat_template(
            [{"role": each.role, "content": each.content} for each in TURNS],
            return_assistant_tokens_mask=True,
            return_dict=True,
        )
        assert dataset.tokens.tolist() == expected["input_ids"]
        assert dataset.labelled.tolist() == [bool(mark) for mark in expected["assistant_masks"]]
        assert 0 < dataset.labelled.sum() < len(dataset.tokens)
        assert dataset.chat_template == MASKED

    def test_format_by_choice(self, chatty):
        dataset = self.build(chatty(CHATML), prompt_format="instruction")
        text = chatty(CHATML).decode(dataset.tokens)
        assert "### Instruction:\nSay hi." in text
        assert dataset.chat_template == INSTRUCTION_TEMPLATE

    def test_a_row_is_dropped_where_no_answer_begins(self, chatty):
        tokenizer = chatty(MASKED)
        first = self.build(tokenizer).labelled.tolist().index(True)
        assert self.build(tokenizer, seq_len=first + 1).labelled.sum() == 1
        with pytest.raises(DataError, match=r"No answer of 'chats\.jsonl' begins within"):
            self.build(tokenizer, seq_len=first)

    def test_a_tokenizer_that_does_not_know_its_places(self, chatty, monkeypatch):
        tokenizer = chatty(CHATML)
        monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda _: False))
        with pytest.raises(DataError, match="does not say where in a text its tokens are"):
            self.build(tokenizer)


SHARED = Path(__file__).parents[3] / "shared"


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real data: {SHARED} is absent")
@pytest.mark.parametrize("model", ["stories260K", "tinystories-llama-6M"])
def test_real_tokenizers_find_the_answers_of_real_instructions(model):
    """LLaMA's kind of tokenizer adds spaces of its own, which must not move the border."""
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / model)
    rows = json.loads((SHARED / "data" / "instruct" / "alpaca_en_demo.json").read_text())[:50]
    for row in rows:
        messages = (
            Message("user", row["instruction"] + row["input"]),
            Message("assistant", row["output"]),
        )
        corpus = Corpus("x", [Example(messages=messages)])
        dataset = build_token_dataset(corpus, tokenizer, seq_len=8192)
        text = tokenizer.decode(dataset.tokens[dataset.labelled], skip_special_tokens=True)
        whole = tokenizer.decode(
            tokenizer(row["output"], add_special_tokens=False)["input_ids"],
            skip_special_tokens=True,
        )
        assert text.strip() == whole.strip()
