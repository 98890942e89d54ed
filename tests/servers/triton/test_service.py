"""Limits of a question are checked before any work is done for it."""

import queue
from importlib import resources
from pathlib import Path

import pytest

from lpdeploy.engines.ort.exporter import export_ort
from lpdeploy.servers.triton.batcher import BusyError
from lpdeploy.servers.triton.service import Question, TextService

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
