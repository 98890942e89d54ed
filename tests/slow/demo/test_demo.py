"""The demo, whole, with fewer steps and trials."""

import pytest

from lpdeploy.demo.run import run_demo
from lpdeploy.errors import ArtifactError


def test_the_demo_ends_with_a_page_and_true_figures(tmp_path):
    output = tmp_path / "demo"
    result = run_demo(output, steps=6, repeats=2)
    page = (output / "index.html").read_text()
    assert page.count("<svg") == 2
    assert "all 7 stages" in page
    assert "What the models write" in page
    assert 1 < result.perplexity["dense"] < result.perplexity["pruned"]
    forms = {(row.engine, row.ratio, row.merged) for row in result.rows}
    assert len(forms) == 2 * 3 * 2
    (output / "mine.txt").write_text("x")
    with pytest.raises(ArtifactError, match="is not empty"):
        run_demo(output)
    assert (output / "mine.txt").exists()
