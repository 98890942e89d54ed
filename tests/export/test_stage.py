"""What export refuses to write over."""

import pytest

from lpdeploy.errors import ArtifactError
from lpdeploy.export.stage import export
from tests.helpers import make_tiny_model
from tests.models.families import choose_kept, make_base, make_run


def test_an_export_never_replaces_its_own_model(tmp_path):
    model = make_tiny_model(tmp_path / "model")
    (model / "lpdeploy.json").write_text("{}")  # as compact leaves it
    for output in (model, tmp_path):
        with pytest.raises(ArtifactError, match="holds what it would be made from"):
            export(str(model), output=output, overwrite=True)
    assert (model / "model.safetensors").is_file()


def test_an_export_never_replaces_its_run(tmp_path):
    base = make_base(tmp_path / "base", "llama-mha")
    run = make_run(tmp_path / "run", base, choose_kept(base, heads=2, channels=20))
    with pytest.raises(ArtifactError, match="No model in .*run'. Run 'lpdeploy compact"):
        export(str(run))
    (run / "model").mkdir()
    for output in (run, run / "model"):
        with pytest.raises(ArtifactError, match="holds what it would be made from"):
            export(str(run), output=output, overwrite=True)
    assert (run / "plan.json").is_file()


def test_unmerged_needs_a_run(tmp_path):
    model = make_tiny_model(tmp_path / "model")
    with pytest.raises(ArtifactError, match="--unmerged needs a run"):
        export(str(model), unmerged=True)
