"""The demo, whole, with fewer steps and trials."""

import pytest

from lpdeploy.demo.run import run_demo
from lpdeploy.errors import ArtifactError


def test_the_demo_ends_with_a_page_and_true_figures(tmp_path):
    output = tmp_path / "demo"
    result = run_demo(output, steps=6, repeats=2)
    page = (output / "index.html").read_text()
    # The scatter, heads and channels, loss and groups, torch and onnx.
    assert page.count("<svg") == 7
    assert "Every stage that was compared computes the same." in page
    assert "What the models write" in page
    assert page.count('<tr><th scope="row">') > 20
    assert 1 < result.perplexity["dense"] < result.perplexity["pruned"]
    forms = {(row.engine, row.ratio, row.merged) for row in result.rows}
    assert len(forms) == 2 * 3 * 2
    (output / "mine.txt").write_text("x")
    with pytest.raises(ArtifactError, match="is not empty"):
        run_demo(output)
    assert (output / "mine.txt").exists()
