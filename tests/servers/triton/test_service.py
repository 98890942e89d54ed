"""Limits of a question are checked before any work is done for it."""

import json
import queue
from importlib import resources
from pathlib import Path

import pytest

from lpdeploy.engines.ort.exporter import export_ort
from lpdeploy.servers.triton.batcher import BusyError
from lpdeploy.servers.triton.service import Question, TextService
from lpdeploy.servers.triton.text_model import read_question

DEMO = Path(str(resources.files("lpdeploy.demo"))) / "assets" / "story-llama-1M"


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    folder = tmp_path_factory.mktemp("service") / "ort"
    export_ort(DEMO, folder, max_seq_len=64, max_batch=2)
    made = TextService(folder, engine="ort")
    yield made
    made.close(30)


def ask(service, **question):
    pieces = queue.Queue()
    service.ask(Question(**question), on_piece=pieces.put, on_error=pieces.put)
    return pieces


def read(pieces):
    text = ""
    while True:
        piece = pieces.get(timeout=30)
        text += piece.text
        if piece.reason:
            return text


QUESTIONS = {
    "10 MB": ({"text": "a " * 5_000_000}, "the prompt has 10000000 bytes, more than 64 positions"),
    "many stop strings": ({"text": "a", "stop": ("x",) * 17}, "at most 16 stop strings"),
    "a long stop string": ({"text": "a", "stop": ("x" * 257,)}, "of 256 characters each"),
    "many tokens": ({"text": "a", "max_tokens": 65}, "max_tokens is 65; it must be 1 to 64"),
    "no tokens": ({"text": "a", "max_tokens": 0}, "max_tokens is 0; it must be 1 to 64"),
}


@pytest.mark.parametrize(("question", "said"), QUESTIONS.values(), ids=QUESTIONS)
def test_a_question_beyond_the_limits_costs_nothing(service, monkeypatch, question, said):
    small = ask(service, text="Once upon a time", max_tokens=20)
    with monkeypatch.context() as patch:
        patch.setattr(service, "_tokenizer", None)  # it is refused before it is tokenized
        with pytest.raises(ValueError, match=said):
            ask(service, **question)
    assert read(small)


def test_a_full_queue_refuses_before_it_reads(service, monkeypatch):
    monkeypatch.setattr(service, "_tokenizer", None)
    monkeypatch.setattr(service._batcher, "_max_waiting", 0)
    with pytest.raises(BusyError, match="requests wait already"):
        ask(service, text="Once upon a time")


TEMPLATE = (
    "{% for turn in messages %}{{ bos_token + turn['role'] + ' said ' + turn['content'] + '. ' }}"
    "{% if turn['content'] == 'fail' %}{{ raise_exception('no such words') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'then ' }}{% endif %}"
)


@pytest.fixture
def chatty(service, monkeypatch):
    monkeypatch.setattr(service._tokenizer, "chat_template", TEMPLATE)
    return service


def test_messages_are_asked_through_the_chat_template(chatty):
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "go"},
    ]
    told = read(ask(chatty, messages=json.dumps(turns), max_tokens=8))
    text = "user said hi. <s>assistant said yes. <s>user said go. then "  # bos by the tokenizer
    assert told == read(ask(chatty, text=text, max_tokens=8))


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("[", "messages is no JSON"),
        ("[" * 100_000, "messages is no JSON|the prompt has 100000 bytes"),
        ("{}", "messages is no list of turns"),
        ('["hi"]', "messages is no list of turns"),
        ('[{"role": "tool", "content": "x"}]', "messages, turn 1 is of the role 'tool'"),
        ("[]", "the last of messages must be of the role user"),
        ('[{"role": "assistant", "content": "x"}]', "must be of the role user"),
        ('[{"role": "user", "content": "fail"}]', r"refuses these messages \(no such words"),
    ],
)  # fmt: skip
def test_messages_that_cannot_be_answered(chatty, messages, said):
    with pytest.raises(ValueError, match=said):
        ask(chatty, messages=messages)


def test_messages_need_a_template(service):
    with pytest.raises(ValueError, match="the model has no chat template; send text_input"):
        ask(service, messages='[{"role": "user", "content": "hi"}]')


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "send text_input or messages, one of them in each request"),
        ({"text_input": [b"a"], "messages": [b"[]"]}, "send text_input or messages, one of them"),
        ({"messages": [b"[]", b"[]"]}, "messages has 2 prompts; send one in each request"),
        ({"text_input": []}, "text_input has 0 prompts; send one in each request"),
        ({"messages": [b"\xc3"]}, "messages is no UTF-8: byte 0 is 195"),
    ],
)
def test_one_prompt_or_conversation_a_request(given, said):
    with pytest.raises(ValueError, match=said):
        read_question(given.get)


def test_what_a_request_asks():
    assert read_question({"text_input": [b"a"]}.get).text == "a"
    asked = read_question({"messages": [b"[]"], "max_tokens": [3]}.get)
    assert (asked.text, asked.messages, asked.max_tokens) == ("", "[]", 3)
