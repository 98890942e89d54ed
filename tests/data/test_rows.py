"""Rows in all forms against the conversation that they hold, and every sentence about a bad one."""

import re

import pytest

from lpdeploy.data.rows import Example, Message, parse_row
from lpdeploy.errors import DataError

TURNS = [("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "See you")]


def chat(*turns):
    return Example(messages=tuple(Message(*turn) for turn in turns))


QUESTION = chat(("user", "Hi"), ("assistant", "Hello"))


class TestForms:
    @pytest.mark.parametrize(
        "row",
        [
            {"messages": [{"role": role, "content": said} for role, said in TURNS]},
            {"conversations": [{"role": role, "content": said} for role, said in TURNS]},
            {
                "conversations": [
                    {"from": {"user": "human", "assistant": "gpt"}[role], "value": said}
                    for role, said in TURNS
                ]
            },
            {
                "prompt": [{"role": role, "content": said} for role, said in TURNS[:3]],
                "completion": [{"role": "assistant", "content": "See you"}],
            },
        ],
    )
    def test_turns(self, row):
        assert parse_row(row, "here") == chat(*TURNS)

    def test_parts_of_text_are_joined(self):
        parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": " there"}]
        row = {
            "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "A"}]
        }
        assert parse_row(row, "here") == chat(("user", "Hi there"), ("assistant", "A"))

    @pytest.mark.parametrize(
        "part",
        [
            {"type": "image_url", "image_url": {"url": "a.png"}},
            {"type": "text", "text": 3},
            "Hi",
            None,
        ],
    )
    def test_other_parts_are_refused(self, part):
        row = {"messages": [{"role": "user", "content": [part]}]}
        with pytest.raises(DataError, match="no text|of type int"):
            parse_row(row, "here")

    @pytest.mark.parametrize("question", ["instruction", "prompt", "question"])
    @pytest.mark.parametrize("answer", ["response", "output", "completion", "answer"])
    def test_questions_and_answers(self, question, answer):
        assert parse_row({question: "Hi", answer: "Hello", "id": 3}, "here") == QUESTION

    def test_input_follows_the_question(self):
        row = {"instruction": "Add.", "input": "{2} 3", "output": "5"}
        assert parse_row(row, "here") == chat(("user", "Add.\n\n{2} 3"), ("assistant", "5"))

    @pytest.mark.parametrize("nothing", [{"input": ""}, {"input": None}, {"system": ""}])
    def test_empty_fields_add_nothing(self, nothing):
        assert parse_row({"instruction": "Hi", "output": "Hello", **nothing}, "here") == QUESTION

    @pytest.mark.parametrize("name", ["system", "system_prompt"])
    def test_system_comes_first(self, name):
        row = {"question": "Hi", "response": "Hello", name: "Be kind."}
        expected = chat(("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"))
        assert parse_row(row, "here") == expected

    def test_a_system_column_comes_before_turns_that_have_none(self):
        turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
        row = {"system": "Be kind.", "conversations": turns}
        kind = chat(("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"))
        assert parse_row(row, "here") == kind
        own = [{"from": "system", "value": "Be kind."}, *turns]
        assert parse_row({"system": "Other.", "conversations": own}, "here") == kind

    @pytest.mark.parametrize(
        ("row", "expected"),
        [
            ({"instruction": None, "question": "Hi", "answer": "Hello"}, QUESTION),
            ({"prompt": "Hi", "response": None, "output": "Hello"}, QUESTION),
            ({"text": "all of it", "prompt": None, "completion": None}, Example("all of it")),
            ({"text": None, "prompt": "Hi", "completion": "Hello"}, QUESTION),
            ({"system": None, "system_prompt": "", "prompt": "Hi", "answer": "Hello"}, QUESTION),
        ],
    )
    def test_columns_that_only_other_rows_have_do_not_count(self, row, expected):
        assert parse_row(row, "here") == expected

    def test_a_conversation_wins_over_its_formatted_text(self):
        turns = [{"role": role, "content": said} for role, said in TURNS]
        row = {"text": "all of it", "prompt": "Hi", "completion": "x", "messages": turns}
        assert parse_row(row, "here") == chat(*TURNS)
        assert parse_row({**row, "messages": None}, "here") == chat(
            ("user", "Hi"), ("assistant", "x")
        )
        assert parse_row({"text": "all of it", "prompt": "Hi"}, "here") == Example("all of it")

    def test_what_follows_the_last_answer_is_left_out(self):
        turns = [{"role": role, "content": said} for role, said in TURNS[:3]]
        assert parse_row({"messages": turns}, "here") == QUESTION

    def test_what_is_empty(self):
        assert Example(" \n").is_empty
        assert chat(("user", "Hi"), ("assistant", " ")).is_empty
        assert not QUESTION.is_empty
        assert not Example("a").is_empty


class TestBadRows:
    @pytest.mark.parametrize(
        ("row", "sentence"),
        [
            (["a"], "here is a list. Give an object with named fields."),
            ({}, "here has the fields (none). Rename them to 'text', to 'messages', or to"),
            ({"instruction": "a"}, "here has the fields instruction. Rename them to 'text'"),
            ({"response": "a"}, "here has the fields response. Rename them to 'text'"),
            ({"text": 3}, "here: 'text' is of type int. Make it a string."),
            (
                {"messages": "Hi"},
                "here: 'messages' is no list of turns. Give each turn as {'role', 'content'}.",
            ),
            ({"conversations": ["Hi"]}, "here: 'conversations' is no list of turns."),
            (
                {"messages": [{"role": "user"}]},
                (
                    "here: 'messages', turn 1 has the fields role. Give it 'role' and 'content', "
                    "or 'from' and 'value'."
                ),
            ),
            (
                {"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]},
                "here: 'messages', turn 2 is of the role 'tool'. Use system, user, assistant.",
            ),
            (
                {"messages": [{"role": ["user"], "content": "a"}]},
                "here: 'messages', turn 1 is of the role ['user']. Use system, user, assistant.",
            ),
            (
                {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
                (
                    "here: 'messages', turn 1: 'content' has a part that is no text. Give parts of "
                    "{'type': 'text', 'text'} alone, or a string."
                ),
            ),
            (
                {"messages": [{"role": "user", "content": "a"}]},
                (
                    "here is a conversation without an answer. Give it a turn of the assistant, or "
                    "leave it out."
                ),
            ),
            ({"messages": []}, "here is a conversation without an answer."),
            (
                {"messages": [{"role": "assistant", "content": "a"}]},
                (
                    "here is a conversation that begins with an answer. Begin it with a turn of "
                    "the user, or leave it out."
                ),
            ),
            (
                {"prompt": [{"role": "user", "content": "a"}], "completion": []},
                "here is a conversation without an answer.",
            ),
        ],
    )
    def test_one_sentence(self, row, sentence):
        with pytest.raises(DataError, match=re.escape(sentence)):
            parse_row(row, "here")
