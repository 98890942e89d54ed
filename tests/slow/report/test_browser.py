"""Pages in a real browser; skipped where there is none. CONTRIBUTING.md says how to run them."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from lpdeploy.artifacts import save_json
from lpdeploy.config import PruneConfig
from lpdeploy.models.compact import compact
from lpdeploy.pruning.run import prune
from lpdeploy.report.compare import compare
from lpdeploy.report.page import save_report
from tests.helpers import make_text, make_tiny_model
from tests.report.facts import make_bench, make_row

SCRIPT = Path(__file__).parents[3] / "tools" / "browser" / "check_page.cjs"


@pytest.fixture(scope="module")
def browser():
    """The command that checks pages, up to where its pictures go."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    node = shutil.which("node")
    if not chromium or not node:
        pytest.skip("needs chromium and node")
    found = [node, "-e", "require('playwright-core'); require('axe-core')"]
    if subprocess.run(found, capture_output=True, check=False).returncode:
        pytest.skip("needs playwright-core and axe-core where node finds them (NODE_PATH)")
    return [node, str(SCRIPT), chromium]


def test_a_page_is_right_in_light_and_dark_on_a_phone_and_in_print(browser, tmp_path):
    run = tmp_path / "run"
    base = make_tiny_model(tmp_path / "base")
    options = PruneConfig(
        steps=3, batch_size=2, micro_batch_size=2, seq_len=16, round_to=4, device="cpu"
    )
    data = make_text(tmp_path / "t.txt")
    prune(str(base), run, data=str(data), options=options)
    bare = save_report(run, output=tmp_path / "bare.html")
    compact(run)
    dense, half = make_row(), make_row(ratio=0.5, parameters=6, p90_ms=9.0)
    save_json(run / "bench.json", make_bench(dense, half).to_json())
    wrong = {"a": "x", "b": "y", "max_abs_diff": 1.0, "tolerance": 1e-4, "ok": False}
    wrong |= {"max_abs_logit": 3.0, "top1_agreement": 0.5}
    save_json(run / "verify.json", {"ok": False, "pairs": [wrong]})
    texts = [{"model": name, "opening": "o", "text": "t " * 99} for name in ("dense", "pruned")]
    save_json(run / "samples.json", texts)
    full = save_report(run, output=tmp_path / "full.html")
    shutil.copytree(run, tmp_path / "other")
    both = tmp_path / "both.html"
    compare([run, tmp_path / "other"], output=both)
    check_pages(browser, tmp_path, bare, full, both)


def check_pages(browser, folder, *pages):
    done = subprocess.run(
        [*browser, str(folder), *map(str, pages)], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert len(found) == 4 * len(pages)
    assert {view: problems for view, problems in found.items() if problems} == {}
