"""What is written against ``generate`` of transformers, the room for it, and what is refused."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lpdeploy.engines.sampling import Sampling
from lpdeploy.engines.torch.runner import load_torch_runner
from lpdeploy.errors import DataError, LpdeployError
from lpdeploy.generation.chat import Conversation, check_chat
from lpdeploy.generation.options import GenerateOptions
from lpdeploy.generation.prompts import load_prompts
from lpdeploy.generation.stage import generate_texts
from lpdeploy.generation.writer import Writer
from tests.helpers import make_tiny_model

TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] + ' ' + message['content'] + ' ' }}"
    "{% endfor %}{{ 'a ' if add_generation_prompt else '' }}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model") / "m", max_position_embeddings=64)


@pytest.fixture
def chatty(tmp_path):
    """A model with a chat template, whose answers do not end by themselves."""
    made = make_tiny_model(tmp_path / "chatty", max_position_embeddings=64, eos_token_id=None)
    (made / "chat_template.jinja").write_text(TEMPLATE)
    return made


def open_writer(folder):
    return Writer(load_torch_runner(folder), folder)


def continue_with_transformers(folder, ids, count):
    model = AutoModelForCausalLM.from_pretrained(folder)
    written = model.generate(
        torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return written[0, len(ids) :].tolist()


class TestTexts:
    def test_as_transformers_continues(self, folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer("w1 w2")["input_ids"]
        expected = continue_with_transformers(folder, ids, 12)
        heard = []
        (found,) = generate_texts(
            folder, ["w1 w2"], GenerateOptions(max_new_tokens=12), device="cpu",
            on_text=heard.append,
        )  # fmt: skip
        (answer,) = found.answers
        both = tokenizer.decode([*ids, *expected], skip_special_tokens=True)
        before = tokenizer.decode(ids, skip_special_tokens=True)
        assert answer.text == "".join(heard) == both.removeprefix(before)
        assert answer.tokens == len(expected)
        assert answer.prompt_tokens == len(ids)
        assert 0 < answer.first_seconds <= answer.seconds

    def test_a_stop_token_ends_the_text_and_is_no_part_of_it(self, folder):
        writer = open_writer(folder)
        prompt = writer.encode("w1 w2", GenerateOptions())
        free = continue_with_transformers(folder, prompt, 6)
        writer._stop_ids = {free[3]}
        answer = writer.write(prompt, GenerateOptions(max_new_tokens=6), asked="w1 w2")
        count = free.index(free[3]) + 1
        assert (answer.tokens, answer.reason) == (count, "stop")
        kept = writer.tokenizer.decode(free[: count - 1], skip_special_tokens=True)
        assert answer.text.split() == kept.split()

    def test_seeds(self, folder):
        def write(seed):
            options = GenerateOptions(
                max_new_tokens=8, sampling=Sampling(temperature=5.0, seed=seed)
            )
            return generate_texts(folder, ["w1"], options)[0].answers[0].text

        assert write(1) == write(1)
        assert len({write(seed) for seed in range(5)}) > 1

    def test_room(self, folder):
        writer = open_writer(folder)
        prompt = [5] * 60
        assert writer.write(prompt, GenerateOptions(), asked="").tokens <= 4
        with pytest.raises(
            LpdeployError,
            match=r"A prompt of 60 tokens and 5 new tokens need more than the 64 positions of the "
            r"model\. Shorten the prompt, or use a smaller `max_new_tokens`\.",
        ):
            writer.write(prompt, GenerateOptions(max_new_tokens=5), asked="")
        with pytest.raises(LpdeployError, match="A prompt of 64 tokens and 1 new tokens"):
            writer.write([5] * 64, GenerateOptions(), asked="")

    def test_one_text_is_no_list(self, folder):
        with pytest.raises(ValueError, match="prompts is one text; give a list of texts"):
            generate_texts(folder, "w1 w2", GenerateOptions())

    @pytest.mark.parametrize("format_", ["raw", "instruction", None])
    def test_an_empty_prompt_is_refused(self, chatty, format_):
        with pytest.raises(LpdeployError, match="The prompt is empty"):
            open_writer(chatty).encode("", GenerateOptions(prompt_format=format_))

    @pytest.mark.parametrize("format_", ["raw", "instruction"])
    def test_what_is_no_text(self, folder, format_):
        with pytest.raises(DataError, match=r"is not text \(.*surrogates not allowed\)\. Write it"):
            open_writer(folder).encode("a\udcff", GenerateOptions(prompt_format=format_))


class TestFormats:
    def test_a_turn_is_written_as_transformers_writes_it(self, chatty):
        tokenizer = AutoTokenizer.from_pretrained(chatty)
        turns = [{"role": "system", "content": "w3"}, {"role": "user", "content": "w1 w2"}]
        expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
        options = GenerateOptions(prompt_format="chat-template", system="w3")
        assert open_writer(chatty).encode("w1 w2", options) == expected

    def test_raw_adds_nothing(self, chatty):
        tokenizer = AutoTokenizer.from_pretrained(chatty)
        encoded = open_writer(chatty).encode("w1 w2", GenerateOptions(prompt_format="raw"))
        assert encoded == tokenizer("w1 w2")["input_ids"]

    def test_the_default_is_the_template_of_a_model_that_has_one(self, folder, chatty):
        writer = open_writer(chatty)
        turn = writer.encode("w1", GenerateOptions(prompt_format="chat-template"))
        assert writer.encode("w1", GenerateOptions()) == turn
        plain = open_writer(folder)
        raw = plain.encode("w1", GenerateOptions(prompt_format="raw"))
        assert plain.encode("w1", GenerateOptions()) == raw
        assert plain.encode("w1", GenerateOptions(system="w2")) == plain.encode(
            "w1", GenerateOptions(system="w2", prompt_format="instruction")
        )

    def test_auto_falls_back_and_chat_template_does_not(self, folder):
        writer = open_writer(folder)
        instruction = writer.encode("w1", GenerateOptions(prompt_format="instruction"))
        assert writer.encode("w1", GenerateOptions(prompt_format="auto")) == instruction
        with pytest.raises(DataError, match="The tokenizer has no chat template"):
            writer.encode("w1", GenerateOptions(prompt_format="chat-template"))

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"max_new_tokens": 0}, "`max_new_tokens` is 0; it must be at least 1"),
            ({"prompt_format": "chat"}, "`prompt_format` is 'chat'; it must be auto or chat-temp"),
            (
                {"system": "x", "prompt_format": "raw"},
                "`system` is a turn of a conversation; it contradicts `prompt_format='raw'`",
            ),
        ],
    )
    def test_wrong_options(self, options, sentence):
        with pytest.raises(ValueError, match=sentence):
            GenerateOptions(**options)


class TestConversation:
    OPTIONS = GenerateOptions(max_new_tokens=4, prompt_format="chat-template")

    def test_earlier_turns_are_part_of_the_next_prompt(self, chatty):
        writer = open_writer(chatty)
        conversation = Conversation(writer, self.OPTIONS)
        first = conversation.ask("w1 w2")
        second = conversation.ask("w3")
        text = f"u w1 w2 a {first.text} u w3 a "
        expected = writer.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert second.prompt_tokens == len(expected)
        told = writer.write(expected, self.OPTIONS, asked="")
        assert told.text == second.text
        assert [message.role for message in conversation.messages] == ["user", "assistant"] * 2

    def test_the_oldest_turns_are_forgotten_where_there_is_no_room(self, chatty):
        options = GenerateOptions(max_new_tokens=20, prompt_format="chat-template", system="w9")
        conversation = Conversation(open_writer(chatty), options)
        for number in range(4):
            conversation.ask(f"w{number}")
        assert conversation.num_forgotten > 0
        roles = [message.role for message in conversation.messages]
        assert roles == ["system", *["user", "assistant"] * (len(roles) // 2)]
        assert conversation.messages[-2].content == "w3"
        conversation.clear()
        assert [message.role for message in conversation.messages] == ["system"]

    def test_turns_are_forgotten_before_answers_become_short(self, chatty):
        conversation = Conversation(
            open_writer(chatty), GenerateOptions(prompt_format="chat-template")
        )
        answers = [conversation.ask(f"w{number}") for number in range(8)]
        assert conversation.num_forgotten > 0
        assert all(answer.prompt_tokens <= 64 - 16 for answer in answers)  # a quarter is left

    def test_a_question_that_never_fits_changes_nothing(self, chatty):
        conversation = Conversation(open_writer(chatty), self.OPTIONS)
        conversation.ask("w1")
        before = list(conversation.messages)
        with pytest.raises(LpdeployError, match="positions of the model. Shorten the prompt"):
            conversation.ask("w1 " * 70)
        assert conversation.messages == before

    def test_a_model_without_a_template(self, folder):
        with pytest.raises(LpdeployError, match=r"no chat template.*'lpdeploy generate' continues"):
            check_chat(open_writer(folder), self.OPTIONS)


class TestPrompts:
    def test_lines(self, tmp_path):
        path = tmp_path / "a.txt"
        path.write_text("one\n\n two \n")
        assert load_prompts(path) == ["one", " two "]

    def test_rows(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_text('{"prompt": "one"}\n"two"\n{"question": "three", "answer": "x"}\n')
        assert load_prompts(path) == ["one", "two", "three"]

    @pytest.mark.parametrize(
        ("name", "content", "sentence"),
        [
            ("a.txt", "\n \n", "holds no prompt. Write one in each line."),
            ("a.jsonl", '{"body": "x"}', "line 1, has no prompt. Give it a text in one of prompt,"),
            ("a.jsonl", '{"prompt": 3}', "line 1, has no prompt."),
            ("a.jsonl", "3", "line 1, has no prompt."),
        ],
    )
    def test_bad_files(self, tmp_path, name, content, sentence):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=sentence):
            load_prompts(tmp_path / name)
