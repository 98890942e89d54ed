import json
import math

import pytest

from lpdeploy.artifacts import save_json
from lpdeploy.config import PruneConfig
from lpdeploy.errors import ArtifactError
from lpdeploy.pruning.run import prune
from lpdeploy.pruning.target import DepthTrial, RateTrial, SizeFound, TargetRecord
from lpdeploy.report.page import save_report
from lpdeploy.run_folder import RunFolder
from tests.helpers import make_text, make_tiny_model

MEASURED = {
    "model": "m", "model_sha256": "x", "engine": "torch", "precision": "fp32", "seq_len": 16,
}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    base = make_tiny_model(tmp_path / "base")
    options = PruneConfig(
        steps=3, batch_size=2, micro_batch_size=2, seq_len=16, round_to=4, device="cpu"
    )
    prune(str(base), tmp_path / "run", data=str(make_text(tmp_path / "t.txt")), options=options)
    return tmp_path / "run"


def test_the_page_of_a_bare_run_shows_its_training(run):
    page = save_report(run).read_text()
    assert "50.0 % of the heads" in page
    removed = json.loads((run / "plan.json").read_text())["achieved"]["parameters"]
    assert f"<h1>base without {100 * removed:.0f} % of its parameters</h1>" in page
    assert "removed, chosen by LoRA&#39;s gradients, while fine-tuning with LoRA." in page
    assert "<svg" in page
    assert "Latency" not in page


def test_the_page_shows_what_later_stages_found_and_escapes_text(run):
    pair = {"a": "x", "b": "y", "max_abs_diff": 1e-6, "tolerance": 1e-4, "ok": False}
    pair |= {"max_abs_logit": 3.0, "top1_agreement": 1.0}
    save_json(run / "verify.json", {"ok": False, "pairs": [pair]})
    save_json(
        run / "samples.json", [{"model": "dense", "opening": "o", "text": "<script>once</script>"}]
    )
    score = {"perplexity": 19.5, "bits_per_byte": 1.0, "tokens": 3}
    save_json(run / "eval.json", {**MEASURED, "perplexity": {"v": score}})
    page = save_report(run, output=run / "other.html").read_text()
    assert "&lt;script&gt;once" in page
    assert "<script" not in page
    assert "19.50" in page
    assert "different" in page


def test_the_page_shows_the_quality_of_every_engine(run):
    def measure(engine, perplexity):
        score = {"perplexity": perplexity, "bits_per_byte": 1.0, "tokens": 3}
        return {**MEASURED, "engine": engine, "perplexity": {"v": score}}

    save_json(run / "eval.json", measure("torch", 19.5))
    assert "Quality by engine" not in save_report(run).read_text()
    save_json(run / "eval.json", measure("ort", 19.25) | {"others": [measure("torch", 19.5)]})
    page = save_report(run).read_text()
    assert page.index("<td>ort fp32</td><td>v</td><td>19.25</td>") < page.index(
        "<td>torch fp32</td><td>v</td><td>19.50</td>"
    )


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
    page = " ".join(save_report(run).read_text().replace("</td><td>", " ").split())
    assert "<td>0 50.0 % 37.5 % 2.500 </td>" in page
    assert "<td>1 25.0 % 12.5 % 2.250 chosen</td>" in page
    rows = ("<td>0.0003 2.062 </td>", "<td>0.001 2.125 chosen</td>", "<td>0.003 diverged </td>")
    assert sorted(rows, key=page.index) == list(rows)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="No plan.json"):
        save_report(tmp_path)


def test_a_broken_file_is_refused(run):
    (run / "verify.json").write_text("{")
    with pytest.raises(ArtifactError, match="not valid JSON"):
        save_report(run)
    assert not (run / "report.html").exists()
    assert json.loads((run / "plan.json").read_text())
