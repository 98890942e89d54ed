"""Commands of cells run in this process, where they take a tenth of the time, and are counted."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from lpdeploy.cli.main import main
from lpdeploy.paper.run import CommandError, Commands
from tests.helpers import make_text, make_tiny_model

PRUNE = [
    "--steps", "4", "--batch-size", "2", "--micro-batch-size", "2", "--seq-len", "16",
    "--prune-every", "1", "--ramp", "authors", "--round-to", "4", "--device", "cpu", "--lr", "0.01",
]  # fmt: skip


class Recorder:
    """What ran, and what is to fail."""

    def __init__(self):
        self.commands = []
        self.fail_at = {}  # (verb, words that must be in it) -> error

    def list_verbs(self):
        return [words[0] for words in self.commands]

    def call(self, words):
        self.commands.append(list(words))
        for (verb, part), error in self.fail_at.items():
            if words[0] == verb and part in " ".join(words):
                raise error
        result = CliRunner().invoke(main, [*words, "--json"])
        if result.exit_code:
            raise CommandError(result.stderr.splitlines()[-1].removeprefix("Error: "), killed=False)
        return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(Commands, "call", lambda _, words: recorder.call(words))
    return recorder


@pytest.fixture
def base(tmp_path):
    return make_tiny_model(tmp_path / "base", heads=4, kv_heads=2)


@pytest.fixture
def texts(tmp_path):
    return make_text(tmp_path / "text.txt"), make_text(tmp_path / "valid.txt", seed=1)


@pytest.fixture
def paper(base, texts, tmp_path):
    """Return a function that runs `lpdeploy paper` on the tiny model."""

    def run(table, *words, prune=PRUNE, folder="out", perplexity=True):
        data, valid = texts
        evaluation = ["--perplexity", valid, "--eval-seq-len", "32"] if perplexity else []
        arguments = ["paper", table, base, "--data", data, "--output", tmp_path / folder]
        arguments += [*evaluation, *words, "--", *prune]
        return CliRunner().invoke(main, [str(word) for word in arguments])

    return run


def load_cells(folder):
    paths = sorted((Path(folder) / "cells").glob("*.json"))
    return {path.stem: json.loads(path.read_text()) for path in paths}
