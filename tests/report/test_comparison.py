import re
import shutil

import pytest

from lpdeploy.artifacts import save_json
from lpdeploy.errors import ArtifactError
from lpdeploy.models.compact import compact
from lpdeploy.report.compare import compare, format_comparison
from lpdeploy.report.comparison import build_comparison
from tests.report.facts import (
    AFTER,
    BEFORE,
    make_bench,
    make_evaluation,
    make_facts,
    make_figures,
    make_plan,
    make_record,
    make_row,
)
from tests.report.pages import check_nesting, measure, read_words


def make_run(name, perplexity, *, size=2400, base=10.0, **changes):
    record = make_record()
    record.bytes["after"] = size
    dense = None if base is None else make_figures(base)
    evaluations = []
    if perplexity is not None:
        own = make_figures(perplexity, tokens=changes.pop("tokens", 30))
        evaluations.append(make_evaluation(own, base=dense))
    evaluations += changes.pop("more", [])
    return name, make_facts(*evaluations, folder=name, record=record, **changes)


def test_the_dense_model_comes_first_and_the_runs_follow():
    found = build_comparison([make_run("a", 11.0), make_run("b", 12.0)])
    assert [own.name for own in found.contenders] == ["dense", "a", "b"]
    dense, first, _ = found.contenders
    assert (dense.parameters, dense.bytes, dense.run) == (BEFORE, 4000, None)
    assert list(dense.perplexity.values()) == [10.0]
    assert (first.parameters, first.bytes, first.run) == (AFTER, 2400, "a")
    assert first.removed["parameters"] == 0.4


def test_what_is_larger_and_worse_is_on_no_front():
    runs = [make_run("a", 11.0, size=2400), make_run("b", 12.0, size=2500)]
    found = build_comparison([*runs, make_run("c", 13.0, size=2000)])
    assert [found.contenders[i].name for i in found.size_front] == ["c", "a", "dense"]
    data = found.to_json()
    assert [row["on_size_front"] for row in data["rows"]] == [True, True, False, True]
    assert data["quality"] == "v.txt"


def test_speed_is_time_over_the_dense_model_of_the_same_benchmark():
    def bench(relative, median):
        dense = make_row(parameters=BEFORE, engine="ort")
        pruned = {"ratio": 0.5, "parameters": AFTER, "relative": relative, "median_ms": median}
        return make_bench(dense, make_row(engine="ort", **pruned))

    # The second was timed when the machine was slower, and is the faster one all the same.
    runs = [make_run("a", 11.0, bench=bench(0.9, 2.0)), make_run("b", 10.5, bench=bench(0.5, 9.0))]
    found = build_comparison(runs)
    assert found.work.name == "ort fp32, decode at 8 tokens"
    assert [found.contenders[i].name for i in found.time_front] == ["b", "dense"]
    assert "9 (-50%)" in format_comparison(found)


def test_a_rounded_export_is_a_row_of_its_own():
    rounded = make_evaluation(make_figures(11.5), engine="ort", precision="int4")
    run = make_run("a", 11.0, more=[rounded], exports={("ort", "int4"): 700})
    found = build_comparison([run, make_run("b", 12.0)])
    assert [own.name for own in found.contenders] == ["dense", "a", "a, ort int4", "b"]
    assert found.contenders[2].bytes == 700
    assert 2 in found.size_front


def test_it_works_with_what_is_there():
    found = build_comparison([make_run("a", None), make_run("b", None)])
    assert (found.measure, found.size_front, found.time_front) == (None, (), ())
    text = format_comparison(found)
    assert "Nothing was measured that the runs could be compared by." in text
    assert "perplexity" not in text
    one = build_comparison([make_run("a", 11.0), make_run("b", None)])
    assert [own.name for own in one.contenders if own.perplexity] == ["dense", "a"]


def test_accuracy_stands_in_where_there_is_no_perplexity():
    def run(name, accuracy, size):
        own = make_evaluation(make_figures(accuracy=accuracy), base=make_figures(accuracy=0.7))
        return make_run(name, None, size=size, more=[own])

    found = build_comparison([run("a", 0.6, 2400), run("b", 0.5, 2500)])
    assert found.measure == "accuracy"
    assert [found.contenders[i].name for i in found.size_front] == ["a", "dense"]
    assert "60.0 %" in format_comparison(found)


def test_folders_of_one_name_are_called_as_they_were_given():
    found = build_comparison([("x/run", make_run("run", 11.0)[1]), ("run", make_run("run", 12)[1])])
    assert [own.name for own in found.contenders] == ["dense", "x/run", "run"]


def test_runs_of_different_models_are_refused():
    other = make_run("b", 12.0, plan=make_plan(base_sha256="y"))
    with pytest.raises(ArtifactError, match="'a' and 'b' were pruned from different models"):
        build_comparison([make_run("a", 11.0), other])


def test_texts_of_different_segments_are_refused():
    with pytest.raises(
        ArtifactError,
        match=r"v.txt was measured on other segments in 'a' \(30 tokens in segments of 16\) than "
        r"in 'b' \(31 tokens in segments of 16\). Run 'lpdeploy eval' on both with the same opt",
    ):
        build_comparison([make_run("a", 11.0), make_run("b", 12.0, tokens=31)])


def test_accuracies_over_different_questions_are_refused():
    def run(name, count):
        figures = make_figures(accuracy=0.5)
        figures.tasks["piqa"]["n"] = count
        return make_run(name, None, more=[make_evaluation(figures)])

    with pytest.raises(
        ArtifactError,
        match=r"other questions in 'a' \(10 of piqa\) than in 'b' \(20 of piqa\)",
    ):
        build_comparison([run("a", 10.0), run("b", 20.0)])


def test_a_comparison_needs_two_runs_each_of_them_once(tmp_path):
    with pytest.raises(ValueError, match="a comparison needs two runs or more; give another one"):
        compare([tmp_path])
    with pytest.raises(ValueError, match="is given twice; give each run once"):
        compare([tmp_path, tmp_path / "." / "x" / ".."])
    with pytest.raises(ArtifactError, match="No plan.json"):
        compare([tmp_path, tmp_path / "other"])


@pytest.fixture
def runs(made, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(made, tmp_path / name)
        compact(tmp_path / name)
    return [tmp_path / "a", tmp_path / "b"]


def test_the_page_marks_the_front_and_needs_no_other_file(runs, tmp_path):
    for run, perplexity in zip(runs, (19.5, 19.0), strict=True):
        save_json(run / "eval.json", measure(run, "torch", perplexity, base=18.0))
    found = compare(runs, output=tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    check_nesting(page)
    assert "<h1>2 pruned forms of base</h1>" in page
    assert page.count("<svg") == 1
    assert page.count('<tr class="front">') == 2
    words = read_words(page)
    assert "Best for their size or speed: b." in words
    assert re.search(r"b Not complete size [\d,]+ \d+\.\d\d 19\.00", words)
    assert [own.name for own in found.contenders] == ["dense", "a", "b"]


def test_a_run_that_lost_everything_is_on_no_front_and_no_picture(runs, tmp_path):
    for run, perplexity in zip(runs, ("Infinity", 19.0), strict=True):
        save_json(run / "eval.json", measure(run, "torch", perplexity, base=18.0))
    found = compare(runs, output=tmp_path / "page.html")
    assert [found.contenders[i].name for i in found.size_front] == ["b", "dense"]
    assert "inf" in format_comparison(found)
    assert (tmp_path / "page.html").read_text().count("<svg") == 1


def test_a_page_replaces_no_part_of_a_run_and_no_other_file(runs, tmp_path):
    with pytest.raises(ArtifactError, match="is a part of the run"):
        compare(runs, output=runs[0] / "eval.json")
    other = tmp_path / "notes.html"
    other.write_text("mine")
    with pytest.raises(ArtifactError, match="is not a page that lpdeploy wrote"):
        compare(runs, output=other)
