"""Keys: the same for the same run, another where anything that shapes the result differs."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest

from lpdeploy.config import PruneConfig
from lpdeploy.errors import LpdeployError
from lpdeploy.fields import rename_fields
from lpdeploy.paper.cells import (
    EvalSettings,
    Selection,
    Source,
    Study,
    build_cell,
    identify_source,
    list_cells,
    list_eval_words,
    list_prune_words,
    select,
    show_command,
)
from lpdeploy.paper.tables import TABLES, Row

TEXT = Source("here/valid.txt", "valid.txt", "abc")


def make_study(*, model="m", data="d", words=(), evaluation=None, **options):
    values = PruneConfig(**options).to_json() | {"lora_init": options.get("lora_init")}
    return Study(
        model=Source("here/model", "model", model),
        data=Source("here/data.txt", "data.txt", data),
        prune_words=words,
        prune_options={k: v for k, v in values.items() if k not in ("ratio", "seed")},
        evaluation=evaluation or EvalSettings((TEXT,), 128),
    )


def key(row=None, *, ratio=0.5, seed=0, **study):
    return build_cell(row or Row("r", "r"), make_study(**study), ratio=ratio, seed=seed).key


def test_the_key_reads_and_is_stable():
    assert key().startswith("lora-0.5-seed0-")
    assert key(Row("r", "r", {"schedule": "separate"})).startswith("lora-separate-0.5-seed0-")
    assert key() == key()
    # Neither the name of a row, nor where data lies, nor how an option was typed, changes a run.
    assert key() == key(Row("other", "other", {"criterion": "lora", "schedule": "joint"}))
    assert key() == key(words=("--lr", "0.0001"))
    moved = EvalSettings((dataclasses.replace(TEXT, given="there/valid.txt"),), 128)
    assert key() == key(evaluation=moved)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "n"}, {"data": "e"}, {"ratio": 0.4}, {"seed": 1}, {"lr": 2e-4}, {"steps": 7},
        {"row": Row("r", "r", {"criterion": "gradient"})},
        {"row": Row("r", "r", {"load_in": "8bit"})},
        {"evaluation": EvalSettings((TEXT,), 256)},
        {"evaluation": EvalSettings((dataclasses.replace(TEXT, identity="x"),), 128)},
        {"evaluation": EvalSettings((TEXT,), 128, tasks=("piqa",))},
        {"evaluation": EvalSettings((TEXT,), 128, max_segments=3)},
        {"evaluation": EvalSettings((TEXT,), 128, limit=3)},
    ],
)  # fmt: skip
def test_another_run_has_another_key(change):
    assert key(**change) != key()


def test_rows_start_lora_as_the_paper_does_unless_they_or_the_user_say_otherwise():
    study = make_study()
    cell = build_cell(Row("r", "r"), study, ratio=0.5, seed=0)
    assert cell.options["lora_init"] == "peft"
    words = list_prune_words(cell, study, run=Path("run"))
    assert words[words.index("--lora-init") + 1] == "peft"
    # The keys of cells that ran before there was a choice.
    before = {n: v for n, v in study.prune_options.items() if n != "lora_init"}
    earlier = dataclasses.replace(study, prune_options=before)
    assert build_cell(Row("r", "r"), earlier, ratio=0.5, seed=0).key == cell.key
    groups = Row("g", "g", {"lora_init": "groups"})
    chosen = build_cell(Row("r", "r"), make_study(lora_init="groups"), ratio=0.5, seed=0)
    assert chosen.key == key(groups) != cell.key
    assert "--lora-init" not in list_prune_words(chosen, study, run=Path("run"))


@pytest.mark.parametrize("option", [{"load_in": None}, {"compile": False}])
def test_an_option_of_a_later_version_that_is_not_given_leaves_the_key(option):
    study = make_study()
    later = dataclasses.replace(study, prune_options={**study.prune_options, **option})
    row = Row("r", "r")
    first, second = (build_cell(row, s, ratio=0.5, seed=0) for s in (study, later))
    assert first.key == second.key


COMMITTED = sorted((Path(__file__).parents[2] / "docs" / "measurements").rglob("cells/*.json"))


def test_committed_cells_are_found_again():
    """Their options were recorded under former names; read today they give the same key."""
    assert len(COMMITTED) > 100
    for path in COMMITTED:
        cell = json.loads(path.read_text(encoding="utf-8"))
        recorded = cell["evaluation"]
        tasks = recorded["task_data"]
        evaluation = EvalSettings(
            tuple(Source(name, name, known) for name, known in recorded["perplexity"].items()),
            recorded["seq_len"] or EvalSettings.seq_len,
            tuple(recorded["tasks"].split(",")) if recorded["tasks"] else (),
            Source("t", "t", tasks) if tasks else None,
            recorded.get("max_segments"),
            recorded.get("limit"),
        )
        values = rename_fields(cell["options"])
        start = {"lora_init": values.get("lora_init")}  # left open before there was a choice
        study = Study(
            model=Source("m", "m", cell["model"]["sha256"]),
            data=Source("d", "d", cell["data"]["identity"]),
            prune_words=(),
            prune_options=PruneConfig(**values).to_json() | start,
            evaluation=evaluation,
        )
        if not cell["options"]:
            row = Row("dense", "dense", dense=True)
            (found,) = list_cells(Selection(TABLES["2"], (row,), (), 1), study)
        else:
            found = build_cell(Row("r", "r"), study, ratio=cell["ratio"], seed=cell["seed"])
        assert found.key == path.stem == cell["key"]


def test_a_renamed_option_keeps_the_key():
    given = make_study(prune_warmup=0.2, prune_cooldown=0.3)
    names = {"prune_warmup": "warmup", "prune_cooldown": "cooldown"}
    former = {names.get(name, name): value for name, value in given.prune_options.items()}
    first, second = (
        build_cell(Row("r", "r"), study, ratio=0.5, seed=0)
        for study in (given, dataclasses.replace(given, prune_options=former))
    )
    assert first.key == second.key != key()


def test_the_unpruned_model_runs_once_and_first():
    cells = list_cells(select(TABLES["2"], rows=["lora", "dense"], seeds=2), make_study())
    assert [(c.row.name, c.ratio, c.seed) for c in cells] == [
        ("dense", 0.0, None),
        ("lora", 0.2, 0), ("lora", 0.3, 0), ("lora", 0.5, 0),
        ("lora", 0.2, 1), ("lora", 0.3, 1), ("lora", 0.5, 1),
    ]  # fmt: skip
    # It is the same whatever prune is told, and whatever it is pruned with.
    other = list_cells(select(TABLES["5"]), make_study(lr=1.0, data="e"))
    assert other[0].key == cells[0].key


def test_commands_carry_the_options_unchanged():
    study = make_study(words=("--steps", "9", "--normalize"), device="cpu")
    options = {"criterion": "gradient", "offload_gradients": True, "train_on_prompt": False}
    cell = build_cell(Row("r", "r", options), study, ratio=0.2, seed=1)
    words = list_prune_words(cell, study, run=Path("out/run"))
    assert show_command(words) == (
        "lpdeploy prune here/model --data here/data.txt --output out/run --steps 9 --normalize "
        "--lora-init peft --criterion gradient --offload-gradients --ratio 0.2 --seed 1"
    )
    assert show_command(list_eval_words(cell, study, model="RUN")) == (
        "lpdeploy eval RUN --perplexity here/valid.txt --seq-len 128 --device cpu"
    )


def test_paths_are_cut_to_their_last_part(tmp_path):
    (tmp_path / "a b.yaml").touch()
    words = ["prune", f"--recipe={tmp_path / 'a b.yaml'}", "--data", str(tmp_path / "a b.yaml")]
    assert show_command(words) == "lpdeploy prune '--recipe=a b.yaml' --data 'a b.yaml'"


def test_a_source_is_known_by_what_it_holds(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("one")
    (tmp_path / "y.txt").write_text("one")
    folder, file = identify_source(str(tmp_path / "a")), identify_source(str(tmp_path / "y.txt"))
    assert (folder.name, file.name) == ("a", "y.txt")
    (tmp_path / "a" / "x.txt").write_text("two")
    (tmp_path / "y.txt").write_text("two")
    assert identify_source(str(tmp_path / "a")).identity != folder.identity
    assert identify_source(str(tmp_path / "y.txt")).identity != file.identity
    assert identify_source("wikitext2").identity == "wikitext2"


def test_rows_that_scale_the_steps_need_them():
    selection = select(TABLES["figure-6"])
    with pytest.raises(LpdeployError, match="Give --steps N among the options of prune"):
        list_cells(selection, make_study())
    cells = list_cells(select(TABLES["figure-6"], seeds=1), make_study(steps=200))
    steps = {cell.row.name: cell.options["steps"] for cell in cells}
    assert [steps[f"steps-{x}x"] for x in ("0.25", "0.5", "1", "2")] == [50, 100, 200, 400]
    assert steps["ema-0.3"] == 200
    # lambda needs none.
    list_cells(select(TABLES["figure-6"], rows=["ema-0.9"]), make_study())


def test_unknown_rows_are_refused():
    with pytest.raises(LpdeployError, match="Table 7 has no row 'x'. Choose from joint, separate"):
        select(TABLES["7"], rows=["x"])
    with pytest.raises(LpdeployError, match="Figure 4 compares two rows. Leave --rows out"):
        select(TABLES["figure-4"], rows=["lora"])


UNPRINTED = {
    "figure-6",
    "forms",
    "ramps",
    "rates",
    "recipe",
    "recovery",
    "refit",
    "settings",
}  # drawn only, or ours


def test_tables_hold_together():
    known = {field.name for field in dataclasses.fields(PruneConfig)}
    for table in TABLES.values():
        assert len({row.name for row in table.rows}) == len(table.rows), table.name
        assert table.own_options <= known, table.name
        for row, ratio in itertools.product(table.rows, table.ratios):
            PruneConfig(**row.options)
            paper = table.get_paper(ratio, row.name)
            expected = table.kind not in ("similarity", "texts") and table.name not in UNPRINTED
            expected = expected and "not in the paper" not in row.label and not row.dense
            assert bool(paper) == expected, f"{table.name}: {row.name} at {ratio}"
