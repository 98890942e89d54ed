"""Table 9: what the dense and the pruned models answer, side by side."""

import json

import pytest

from lpdeploy.paper.cells import EvalSettings, select
from lpdeploy.paper.results import ResultRow, TableResult, Text
from lpdeploy.paper.stage import adapt_evaluation
from lpdeploy.paper.tables import TABLES
from lpdeploy.paper.texts import list_text_notes, render_texts, write_cell
from lpdeploy.records import read_record
from tests.paper.conftest import load_cells

PROMPTS = ["Tell me about alpacas.", "Translate the sentence", "Write a Python program"]


def test_each_model_answers_the_three_instructions(paper, recorder, tmp_path):
    result = paper("9", "--rows", "dense,lora", "--ratios", "0.25,0.5")
    assert result.exit_code == 0, result.output
    assert recorder.list_verbs() == ["generate", *["prune", "compact", "generate"] * 2]
    asked = [words for words in recorder.commands if words[0] == "generate"]
    assert all("--examples" in words for words in asked)
    assert "Table 9 compares only texts; --perplexity and --tasks are ignored" in result.stderr
    document = json.loads((tmp_path / "out" / "table-9.json").read_text())
    assert [(row["name"], row["ratio"]) for row in document["rows"]] == [
        ("dense", 0.0), ("lora", 0.25), ("lora", 0.5),
    ]  # fmt: skip
    for row in document["rows"]:
        for text, begin in zip(row["texts"], PROMPTS, strict=True):
            assert text["prompt"].startswith(begin)
            assert text["tokens"] >= 1
    said = [tuple(text["text"] for text in row["texts"]) for row in document["rows"]]
    assert len(set(said)) == 3  # the models differ
    assert str(tmp_path) not in json.dumps(document)
    assert "Wrote" in result.stderr
    assert ".svg" not in result.stderr.split("Wrote")[1].splitlines()[0]
    assert not (tmp_path / "out" / "table-9.svg").exists()
    again = read_record(TableResult, document)
    assert json.loads(json.dumps(again.to_json())) == document


def test_finished_cells_are_kept(paper, recorder, tmp_path):
    words = ("9", "--rows", "dense,lora", "--ratios", "0.5")
    assert paper(*words).exit_code == 0
    cells = load_cells(tmp_path / "out")
    assert len(cells) == 2
    assert all(cell["evaluation"]["examples"] is True for cell in cells.values())
    count = len(recorder.commands)
    assert paper(*words).exit_code == 0
    assert len(recorder.commands) == count


def test_one_seed_and_no_measure():
    assert select(TABLES["9"], seeds=3).seeds == 1
    measured = EvalSettings(tasks=("piqa",))
    assert adapt_evaluation(TABLES["9"], measured) == EvalSettings(examples=True)
    assert adapt_evaluation(TABLES["figure-4"], measured) == EvalSettings()
    assert adapt_evaluation(TABLES["2"], measured) is measured


def test_an_evaluation_without_texts_has_the_form_that_it_had():
    assert "examples" not in EvalSettings(tasks=("piqa",)).to_json()


def make_document(*answers):
    rows = [
        ResultRow(name=f"r{i}", label=f"model {i}", ratio=i / 10, seeds=1, values={}, paper={},
                  cells=("k",), texts=tuple(texts))
        for i, texts in enumerate(answers)
    ]  # fmt: skip
    return TableResult(
        table="9", model="m", data="d", command="c", seeds=1, columns=(), rows=tuple(rows), cells=2,
        missing=0, failed=(), machines=1, machine=None,
    )  # fmt: skip


def test_answers_stand_side_by_side():
    lines = render_texts(
        make_document(
            [Text("a", " yes ", 2, "stop"), Text("b", "no", 2, "stop")],
            [Text("a", "maybe", 9, "length")],
        )
    )
    assert lines == [
        "| instruction | model 0 | model 1, 10% |",
        "| --- | --- | --- |",
        "| parameters |  |  |",
        "| a | yes | maybe … |",
        "| b | no |  |",
    ]


@pytest.mark.parametrize(
    ("reasons", "sentence"),
    [
        ([(5, "stop")], None),
        ([(5, "stop"), (9, "length")], "with … was cut after 9 tokens."),
        ([(7, "length"), (9, "length")], "with … was cut after 7 to 9 tokens."),
    ],
)
def test_cut_answers_are_told(reasons, sentence):
    texts = [Text(str(i), "x", tokens, reason) for i, (tokens, reason) in enumerate(reasons)]
    notes = list_text_notes(make_document(texts))
    assert len(notes) == (1 if sentence is None else 2)
    assert sentence is None or notes[1].endswith(sentence)


def test_code_keeps_its_lines_and_signs():
    code = "def f(n):\n    return n <= 1 or __x__[n] | 2"
    assert write_cell(code) == (
        "def f(n):<br>&nbsp;&nbsp;&nbsp;&nbsp;return n &lt;= 1 or \\_\\_x\\_\\_\\[n\\] \\| 2"
    )
