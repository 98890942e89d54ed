"""What a reader sees, against figures worked out by hand."""

import re
from dataclasses import replace

import pytest

from lpdeploy.machine import Machine
from lpdeploy.paper.cells import EvalSettings, Source, Study, list_cells, select
from lpdeploy.paper.document import build_document, list_values, summarize
from lpdeploy.paper.plot import draw_document
from lpdeploy.paper.render import render_markdown
from lpdeploy.paper.results import CellResult, Value
from lpdeploy.paper.run import summarize_log
from lpdeploy.paper.tables import TABLES
from lpdeploy.pruning.log import StepInfo, append_log
from lpdeploy.run_folder import RunFolder

MACHINE = Machine(
    cpu="CPU", cores=2, gpu=None, threads=2, system="Linux", date="2026-01-02T00:00:00",
    versions={"lpdeploy": "0.1.0", "torch": "2.0"},
)  # fmt: skip
STUDY = Study(
    model=Source("m", "m", "1"),
    data=Source("d.txt", "d.txt", "2"),
    prune_words=(),
    prune_options={"steps": 8, "criterion": "lora"},
    evaluation=EvalSettings((Source("v|1.txt", "v|1.txt", "3"),), 128, ("piqa", "hellaswag")),
)


def make_result(perplexity, *, average=0.5, seconds=1.0, peak=2e9):
    return CellResult(
        key="k", model={}, data={}, ratio=0.5, seed=0, options={}, evaluation={}, commands=(),
        undisturbed=True, machine=MACHINE,
        prune={"achieved": {"parameters": 0.4}, "peak_bytes": peak, "seconds": 60.0},
        training={"step_seconds": seconds, "scoring_seconds": 0.1, "scoring_share": 0.1},
        eval={
            "perplexity": {"v|1.txt": {"perplexity": perplexity}},
            "tasks": {
                "piqa": {"acc": 0.6, "acc_norm": 0.7},
                "hellaswag": {"acc": 0.3, "acc_norm": 0.4},
            },
            "average": average,
        },
    )  # fmt: skip


def make_document(table, values, *, seeds, rows=(), ratios=(0.5,), failed=()):
    """``values``: (row, seed) -> result."""
    selection = select(TABLES[table], rows=rows, ratios=ratios, seeds=seeds)
    cells = list_cells(selection, STUDY)
    results = {
        cell.key: values[cell.row.name, cell.seed]
        for cell in cells
        if (cell.row.name, cell.seed) in values
    }
    return build_document(
        selection, STUDY, cells, results, command="lpdeploy paper ...", folder=None,
        failed={cell.key: "Out of memory." for cell in cells if cell.row.name in failed},
    )  # fmt: skip


JOINT = {("joint", 0): make_result(18.0), ("joint", 1): make_result(19.0, average=0.6)}


def test_markdown_of_a_table():
    values = {**JOINT, ("separate", 0): make_result(20.0)}
    document = make_document("7", values, seeds=2, failed=["separate"])
    text = render_markdown(document)
    table = [line for line in text.splitlines() if line.startswith("|")]
    # stdev of 18 and 19 is sqrt(0.5) = 0.7071; of 0.5 and 0.6 it is 0.0707.
    names = ["v\\|1.txt ↓", "piqa, % ↑", "hellaswag, % ↑", "average, % ↑"]
    paper = ["paper: WikiText2", "paper: PTB", "paper: average, %"]
    joint = "50% # Joint # **18.50 ± 0.71** # **60.00 ± 0.00** # **40.00 ± 0.00** # "
    joint += "**55.00 ± 7.07** # -40.0% # 2 # 18.37 # 28.68 # 49.71"
    separate = "50% # Separate # 20.00 # **60.00** # **40.00** # 50.00 # -40.0% # 1 # "
    separate += "21.78 # 40.39 # 47.56"
    expected = [
        ["pruned", "method", *names, "parameters", "seeds", *paper],
        ["---"] * 11,
        joint.split(" # "),
        separate.split(" # "),
    ]
    assert table == [f"| {' | '.join(cells)} |" for cells in expected]
    assert "1 of 4 cells are missing." in text
    assert "Failed: Separate, 50%, seed 1: Out of memory." in text
    assert "`lpdeploy paper ...`" in text
    assert "CPU, 2 threads, lpdeploy 0.1.0, torch 2.0, 2026-01-02." in text


def test_standard_errors_stand_in_brackets():
    first, second = make_result(18.0), make_result(19.0)
    for result, error in ((first, 0.04), (second, 0.05)):
        result.eval["tasks"]["piqa"]["acc_stderr"] = error
        result.eval["tasks"]["hellaswag"]["acc_norm_stderr"] = 0.03
    document = make_document("7", {("joint", 0): first, ("joint", 1): second}, seeds=2)
    text = render_markdown(document)
    # The average's: sqrt(0.04**2 + 0.03**2) / 2 = 0.025, and 0.0292.
    expected = "60.00 ± 0.00 (4.50) | 40.00 ± 0.00 (3.00) | 50.00 ± 0.00 (2.71)"
    assert expected in text
    assert "In brackets: the standard error over the documents." in text
    assert document.to_json()["rows"][0]["values"]["piqa"]["error"] == pytest.approx(0.045)
    assert "standard error" not in render_markdown(make_document("7", JOINT, seeds=2))


def test_costs_stand_against_the_first_row():
    values = {
        ("gradient", 0): make_result(10.0, seconds=4.0, peak=4e9),
        ("lora", 0): make_result(11.0, seconds=1.0, peak=3e9),
    }
    document = make_document("6", values, seeds=1)
    _, offload, lora = document.rows
    assert lora.values["s/iter"].relative == 0.25
    assert offload.values == {}
    row = next(line for line in render_markdown(document).splitlines() if "LoRAPrune" in line)
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[3] == "**1** (-75.0%)"
    assert cells[6] == "**3.00** (-25.0%)"
    assert cells[8] == "11.00 (+10.0%)"
    assert cells[-4:-1] == ["14.1", "18.30", "7,200"]


def test_one_row_alone_is_not_the_best():
    document = make_document("7", JOINT, seeds=2)
    assert "**" not in render_markdown(document)


def test_rows_that_are_the_same_run_are_counted_once():
    document = make_document("figure-6", {}, seeds=1, rows=["ema-0.9", "ema-0.6", "steps-1x"])
    assert (document.cells, document.missing) == (3, 3)
    study = Study(STUDY.model, STUDY.data, (), {"steps": 8, "ema_decay": 0.9}, STUDY.evaluation)
    selection = select(TABLES["figure-6"], rows=["ema-0.9", "steps-1x"], seeds=1)
    cells = list_cells(selection, study)
    results = {cells[0].key: make_result(9.0)}
    document = build_document(selection, study, cells, results, command="", folder=None, failed={})
    assert (document.cells, document.missing) == (1, 0)
    assert [row.values["v|1.txt"].mean for row in document.rows] == [9.0, 9.0]


def test_values_take_the_accuracy_of_the_papers_average():
    values = list_values(make_result(9.0))
    assert (values["piqa"], values["hellaswag"], values["average"]) == (0.6, 0.4, 0.5)
    assert values["scoring"] == 100.0


def test_the_spread_of_one_value_is_none():
    assert summarize([{"a": 2.0}]) == {"a": Value(2.0, None, 1)}
    assert summarize([{"a": 1.0}, {"a": 2.0}, {"a": 6.0}])["a"].spread == pytest.approx(7**0.5)


def test_the_log_leaves_out_calibration_first_step_and_unscored_steps(tmp_path):
    run = RunFolder(tmp_path)
    steps = [(0, 90, 9), (1, 50, 5), (2, 2, 1), (3, 4, 1), (4, 8, 1), (5, 1, 0)]
    for step, seconds, scoring in steps:
        info = StepInfo(step, 5, 1.0, 0.0, 1e-4, 1.0, seconds, scoring, 0.0, 0, removed=False)
        append_log(run, info)
    assert summarize_log(run) == {
        "steps": 5, "step_seconds": 4, "scoring_seconds": 1, "scoring_share": 0.25,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("table", "row"), [("2", "lora"), ("4", "lora"), ("8", "every-5"), ("figure-6", "ema-0.3")]
)
def test_every_kind_of_plot_names_what_it_shows(table, row):
    values = {(row, seed): make_result(9.0 + seed) for seed in (0, 1)}
    svg = draw_document(make_document(table, values, seeds=2))
    assert re.search(r"<svg[^>]*>", svg)
    assert "v|1.txt, perplexity" in svg
    label = {
        "2": "LoRAPrune (lora)",
        "4": "LoRA-guided (lora)",
        "8": "steps between pruning events",
    }
    assert label.get(table, "lambda of the moving average") in svg


def test_tasks_outside_of_the_average_are_drawn():
    result = make_result(9.0)
    result.eval.update(perplexity={}, tasks={"mmlu": {"acc": 0.25}}, average=None)
    study = replace(STUDY, evaluation=EvalSettings(tasks=("mmlu",)))
    selection = select(TABLES["7"], ratios=[0.5], seeds=1)
    cells = list_cells(selection, study)
    document = build_document(
        selection, study, cells, {cells[0].key: result}, command="", folder=None, failed={}
    )
    assert "mmlu, %" in draw_document(document)


def test_nothing_measured_is_no_plot():
    assert draw_document(make_document("7", {}, seeds=1)) is None
