from lpdeploy.report.forms import choose_text, get_dense, get_plain
from tests.report.facts import (
    AFTER,
    BEFORE,
    make_bench,
    make_evaluation,
    make_facts,
    make_figures,
    make_row,
)


def test_nothing_is_listed_before_the_model_is_written():
    from lpdeploy.report.forms import list_forms

    assert list_forms(None, (), None, {}) == ()


def test_sizes_come_from_the_record_the_benchmark_and_the_exports():
    bench = make_bench(
        make_row(parameters=BEFORE, engine="ort", bytes=4100),
        make_row(parameters=AFTER, ratio=0.5, engine="ort", bytes=2500),
    )
    forms = make_facts(bench=bench, exports={("ort", "int4"): 700}).forms
    assert {form.name: form.bytes for form in forms} == {
        "dense, torch": 4000,
        "dense, ort fp32": 4100,
        "pruned, torch": 2400,
        "pruned, ort fp32": 2500,
        "pruned, ort int4": 700,
    }
    assert [form.pruned for form in forms] == [False, False, True, True, True]


def test_rows_of_other_models_and_of_unmerged_adapters_are_left_out():
    rows = [
        make_row(parameters=BEFORE),
        make_row(parameters=AFTER, ratio=0.5),
        make_row(parameters=AFTER + 1, ratio=0.2, engine="ort"),
        make_row(parameters=AFTER, ratio=0.5, engine="onnx", merged=False),
        make_row(parameters=AFTER, ratio=0.5, engine="trt", batch=8),
    ]
    names = {form.name for form in make_facts(bench=make_bench(*rows)).forms}
    assert names == {"dense, torch fp32", "pruned, torch fp32"}


def test_the_model_stands_for_its_exports_where_it_was_measured():
    rounded = make_evaluation(make_figures(12.0), engine="ort", precision="int4")
    export = make_evaluation(make_figures(11.0), engine="onnx")
    plain = make_evaluation(make_figures(11.0), base=make_figures(10.0))
    assert get_plain(make_facts(rounded, export, plain).forms).name == "pruned, torch fp32"
    assert get_plain(make_facts(rounded, export).forms).name == "pruned, onnx fp32"
    assert get_plain(make_facts(rounded).forms).name == "pruned, ort int4"
    assert get_plain(()) is None
    assert get_dense(make_facts(plain).forms).name == "dense, torch fp32"


def test_a_plot_takes_the_text_that_the_dense_model_has():
    other = make_evaluation(make_figures(30.0, tokens=9), engine="ort")
    plain = make_evaluation(make_figures(10.5), base=make_figures(10.0))
    assert choose_text(make_facts(other, plain).forms).tokens == 30
    assert choose_text(make_facts(other).forms).tokens == 9
    assert choose_text(make_facts().forms) is None
