import itertools
import json
import math
import re

import pytest

from lpdeploy.artifacts import save_json
from lpdeploy.errors import ArtifactError
from lpdeploy.generation.samples import Sample
from lpdeploy.models.compact import compact
from lpdeploy.pruning.target import DepthTrial, RateTrial, SizeFound, TargetRecord
from lpdeploy.report.page import _arrange_samples, save_report
from lpdeploy.run_folder import RunFolder
from tests.report.facts import make_bench, make_row
from tests.report.pages import check_nesting, measure, read_words

PAIR = {"a": "x", "b": "y", "max_abs_diff": 1e-6, "tolerance": 1e-4, "ok": True}
PAIR |= {"max_abs_logit": 3.0, "top1_agreement": 1.0}


@pytest.fixture
def compacted(run):
    compact(run)
    return run


def test_the_page_of_a_bare_run_says_what_is_known(run):
    page = save_report(run).read_text()
    removed = json.loads((run / "plan.json").read_text())["achieved"]["parameters"]
    assert f"<h1>base without {100 * removed:.0f} % of its parameters</h1>" in page
    words = read_words(page)
    assert "50.0 % of the heads and" in words
    assert "removed, chosen by LoRA&#39;s gradients, while fine-tuning with LoRA." in words
    assert f"Not complete: {100 * removed:.0f} % fewer parameters" in words
    assert "The smaller model has not been written yet (&#39;lpdeploy compact&#39;)." in words
    assert "Layers by KV heads" in words
    assert "Training and pruning" in words
    for later in ("Latency", "Quality, size", "What rounding", "What the models"):
        assert later not in words


def test_the_page_is_one_file_that_asks_for_nothing(compacted):
    save_json(compacted / "bench.json", make_bench(make_row(), make_row(ratio=0.5)).to_json())
    save_json(compacted / "eval.json", measure(compacted, "torch", 19.5, base=18.0))
    page = save_report(compacted).read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(source.startswith(("#", "data:")) for source in sources)
    assert "@import" not in page
    assert "<script" not in page
    fetched = [url for url in re.findall(r"url\(([^)]*)\)", page) if not url.startswith("#")]
    assert fetched == []


def test_every_id_of_a_page_is_there_once_and_every_picture_is_spoken(compacted):
    save_json(compacted / "eval.json", measure(compacted, "torch", 19.5, base=18.0))
    page = save_report(compacted).read_text()
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) > 10
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]*)"', page)) <= set(ids)
    pictures = re.findall(r"<svg [^>]*>", page)
    assert len(pictures) == 5  # the scatter, two maps, two of the training
    assert all('role="img" aria-label="' in picture for picture in pictures)


def test_headings_descend_and_tables_can_be_read_by_ear(compacted):
    save_json(compacted / "eval.json", measure(compacted, "torch", 19.5, base=18.0))
    page = save_report(compacted).read_text()
    levels = [int(level) for level in re.findall(r"<h(\d)", page)]
    assert levels[0] == 1
    assert all(below <= above + 1 for above, below in itertools.pairwise(levels))
    assert "<th>" not in page
    boxes = re.findall(r'<div class="scroll[^>]*>', page)
    assert boxes
    assert all('tabindex="0" role="region" aria-label="' in box for box in boxes)
    check_nesting(page)


def test_the_page_shows_what_later_stages_found_and_escapes_text(run):
    save_json(run / "verify.json", {"ok": False, "pairs": [{**PAIR, "ok": False}]})
    text = "<script>once</script>"
    save_json(run / "samples.json", [{"model": "dense", "opening": "o", "text": text}])
    page = save_report(run, output=run / "other.html").read_text()
    assert "&lt;script&gt;once" in page
    assert "<script" not in page
    words = read_words(page)
    assert "Problem:" in words
    assert "Some stages differ" in words
    assert "x and y 1.0e-06 100.0 % 1.0e-04 different" in words


def test_a_name_that_is_no_text_or_no_formula_does_not_stop_the_page(compacted):
    odd = measure(compacted, "torch", 19.5, base=18.0)
    for part in (odd, odd["base"]):
        part["perplexity"] = {"a$b$<\udcff>.txt": part["perplexity"].pop("t/v.txt")}
    save_json(compacted / "eval.json", odd)
    page = save_report(compacted).read_text(encoding="utf-8")
    assert "perplexity on a$b$&lt;?&gt;.txt" in page
    assert "18.00 to 19.50 on a$b$&lt;?&gt;.txt" in page


def test_the_page_shows_the_quality_of_every_engine(compacted):
    torch = measure(compacted, "torch", 19.5, base=18.0)
    rounded = measure(compacted, "ort", 19.9, precision="int4")
    save_json(compacted / "eval.json", {**rounded, "others": [torch]})
    words = read_words(save_report(compacted).read_text())
    assert re.search(r"dense, torch fp32 [\d,]+ \d+\.\d\d 18\.00", words)
    assert re.search(r"pruned, torch fp32 [\d,]+ \d+\.\d\d 19\.50", words)
    assert re.search(r"pruned, ort int4 \(rounded\) [\d,]+ 19\.90", words)
    assert "perplexity 18.00 to 19.50 on v.txt" in words


@pytest.mark.parametrize("lost", ["NaN", "Infinity"])
def test_a_perplexity_that_is_no_number_is_a_problem_and_not_a_dot(compacted, lost):
    save_json(compacted / "eval.json", measure(compacted, "torch", lost, base=18.0))
    page = save_report(compacted).read_text()
    assert "Problem:" in page
    assert "perplexity on v.txt is not a finite number, unlike the dense model" in page
    assert page.count("<svg") == 4  # no scatter: the dense model alone


def test_what_is_rounded_is_not_called_equal(compacted):
    torch = measure(compacted, "torch", 19.5, base=18.0)
    rounded = measure(compacted, "ort", 20.5, precision="int4")
    save_json(compacted / "eval.json", {**rounded, "others": [torch]})
    words = read_words(save_report(compacted).read_text())
    assert "ort int4 not verified 20.50 19.50 +5.1 %" in words
    pair = {**PAIR, "b": "ort-unpacked/torch", "max_abs_diff": 2.0, "tolerance": None}
    pair["top1_agreement"] = 0.918
    save_json(compacted / "verify.json", {"ok": True, "pairs": [pair]})
    words = read_words(save_report(compacted).read_text())
    assert "ort int4 91.8 % 2 3 20.50 19.50 +5.1 %" in words
    assert "x and ort-unpacked/torch 2.0e+00 91.8 % rounding rounded" in words
    assert "Every stage computes the same" not in words


def test_the_page_warns_of_times_that_are_not_steady(run):
    steady = make_bench(make_row(p90_ms=2.2), make_row(ratio=0.5, parameters=6, p90_ms=2.2))
    save_json(run / "bench.json", steady.to_json())
    words = read_words(save_report(run).read_text())
    assert "These times are not steady." not in words
    assert "40 % fewer parameters torch fp32 decode" in words
    save_json(run / "bench.json", make_bench(make_row(), make_row(p90_ms=7.25)).to_json())
    words = read_words(save_report(run).read_text())
    assert "The 90th percentile is up to 3.6 times the 10th ( torch )" in words.replace(
        "(torch)", "( torch )"
    )


def test_what_was_asked_and_not_reached_is_not_called_pruned(compacted):
    plan = json.loads((compacted / "plan.json").read_text())
    assert plan["ratio"] == 0.5
    dense = make_row(parameters=1000)
    rows = make_bench(dense, make_row(ratio=0.5, parameters=690))
    save_json(compacted / "bench.json", rows.to_json())
    page = save_report(compacted).read_text()
    assert "31 % fewer parameters" in page
    assert "50 % pruned" not in page
    assert "50% pruned" not in page


def test_the_page_says_what_made_the_run(run):
    words = read_words(save_report(run).read_text())
    command = "lpdeploy prune base --data t.txt --output run --ratio 0.5 --round-to 4"
    assert f"{command} --removal cut --steps 3 --batch-size 2" in words
    assert "data t.txt seed 0" in words
    manifest = json.loads((run / "manifest.json").read_text())["stages"]["prune"]
    for sha256 in (*manifest["inputs"].values(), *manifest["outputs"].values()):
        assert sha256 in words
    assert f"torch {manifest['versions']['torch']}" in words
    assert str(run.parent) not in words


def test_the_loss_is_drawn_with_its_events_and_the_held_out_loss(run):
    page = save_report(run).read_text()
    assert "groups removed" in page
    assert "held out" not in page
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    lines[-1]["valid_loss"] = 3.25
    with RunFolder(run).recorded(run / "log.jsonl"):
        (run / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    page = save_report(run).read_text()
    assert "held out" in page
    assert "The training loss is the cross-entropy mixed with" not in page


def test_a_run_that_distilled_says_that_its_loss_is_mixed(run):
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["stages"]["prune"]["options"]["distill"] = 0.5
    with RunFolder(run).recorded(run / "manifest.json"):
        save_json(run / "manifest.json", manifest)
    page = save_report(run).read_text()
    assert "The training loss is the cross-entropy mixed with" in page


def test_the_page_shows_what_was_tried_for_depth_and_learning_rate(run):
    shapes = [
        {"drop_layers": 0, "head_ratio": 0.5, "channel_ratio": 0.375},
        {"drop_layers": 1, "head_ratio": 0.25, "channel_ratio": 0.125},
    ]
    trials = [DepthTrial(shape, loss) for shape, loss in zip(shapes, (2.5, 2.25), strict=True)]
    rates = (RateTrial(1e-3, 2.125), RateTrial(3e-4, 2.0625), RateTrial(3e-3, math.inf))
    asked = {"ratio": 0.5, "depth": "auto", "lr": "auto"}
    record = TargetRecord(asked, shapes[1], SizeFound(9, 4), tuple(trials), rates)
    with RunFolder(run).recorded(run / "target.json"):
        save_json(run / "target.json", record.to_json())
    words = read_words(save_report(run).read_text())
    assert "0 50.0 % 37.5 % 2.500 1 25.0 % 12.5 % 2.250 chosen" in words
    assert "0.0003 2.062 0.001 2.125 chosen 0.003 diverged" in words


def test_samples_stand_in_columns_even_if_a_model_was_not_asked():
    samples = [Sample("dense", "a", "1"), Sample("pruned", "a", "2"), Sample("dense", "b", "3")]
    table = _arrange_samples(samples)
    assert table.models == ("dense", "pruned")
    assert table.rows == (("a", ("1", "2")), ("b", ("3", None)))


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="No plan.json"):
        save_report(tmp_path)


def test_a_file_that_is_no_page_of_ours_is_not_replaced(run, tmp_path):
    other = tmp_path / "notes.html"
    other.write_text("mine")
    with pytest.raises(ArtifactError, match="is not a page that lpdeploy wrote, so it is not repl"):
        save_report(run, output=other)
    assert other.read_text() == "mine"


def test_a_broken_file_is_refused(run):
    (run / "verify.json").write_text("{")
    with pytest.raises(ArtifactError, match="not valid JSON"):
        save_report(run)
    assert not (run / "report.html").exists()
    assert json.loads((run / "plan.json").read_text())
