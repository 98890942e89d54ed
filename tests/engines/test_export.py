"""Where export writes, what it records, and what it refuses to write over."""

import json

import pytest

from lpdeploy.artifacts import compute_sha256
from lpdeploy.engines.export import export
from lpdeploy.engines.exports import load_place
from lpdeploy.engines.trt import exporter as tensorrt
from lpdeploy.engines.trt.library import wrap_module
from lpdeploy.engines.verify import verify
from lpdeploy.errors import ArtifactError, LpdeployError
from lpdeploy.models.compact import compact
from lpdeploy.models.place import locate_model
from tests import fake_tensorrt
from tests.engines.test_verify import OPTIONS, prune
from tests.helpers import make_text, make_tiny_model
from tests.models.families import choose_kept, make_base, make_run


def test_an_export_never_replaces_its_own_model(tmp_path):
    model = make_tiny_model(tmp_path / "model")
    (model / "lpdeploy.json").write_text("{}")  # as compact leaves it
    for output in (model, tmp_path):
        with pytest.raises(ArtifactError, match="holds what it is made from"):
            export(str(model), output=output, overwrite=True)
    assert (model / "model.safetensors").is_file()


def test_an_export_never_replaces_its_run(tmp_path):
    base = make_base(tmp_path / "base", "llama-mha")
    run = make_run(tmp_path / "run", base, choose_kept(base, heads=2, channels=20))
    with pytest.raises(ArtifactError, match="No model in .*run'. Run 'lpdeploy compact"):
        export(str(run))
    (run / "model").mkdir()
    for output in (run, run / "model"):
        with pytest.raises(ArtifactError, match="holds what it is made from"):
            export(str(run), output=output, overwrite=True)
    assert (run / "plan.json").is_file()


def test_unmerged_needs_a_run(tmp_path):
    model = make_tiny_model(tmp_path / "model")
    with pytest.raises(ArtifactError, match="`unmerged=True` needs a run"):
        export(str(model), unmerged=True)


@pytest.mark.slow
def test_an_engine_has_a_folder_and_an_entry_of_its_own(tmp_path, monkeypatch):
    library = wrap_module("tensorrt_rtx", fake_tensorrt.make_module())
    monkeypatch.setattr(tensorrt, "load_library", lambda: library)
    model = make_tiny_model(tmp_path / "model", num_hidden_layers=1)
    with pytest.raises(ArtifactError, match="no trt export .*export .* --engine trt' first"):
        verify(model, engine="trt")
    result = export(str(model), engine="trt", precision="fp16", max_seq_len=32)
    assert result.output == model / "trt"
    assert result.contract.precision == "fp16"
    entry = json.loads((model / "trt" / "manifest.json").read_text())["stages"]["export trt"]
    assert entry["options"]["engine"] == "trt"
    assert entry["outputs"] == {"trt": compute_sha256(model / "trt" / "model.engine")}


@pytest.mark.parametrize("tied", [False, True])
def test_ort_has_a_folder_and_an_entry_of_its_own(tmp_path, tied):
    shape = {"num_hidden_layers": 1, "head_dim": 16, "intermediate_size": 64}
    model = make_tiny_model(tmp_path / "model", **shape, tie_word_embeddings=tied)
    with pytest.raises(ArtifactError, match="no ort export .*export .* --engine ort' first"):
        verify(model, engine="ort")
    result = export(str(model), engine="ort", precision="int8", opset=None)
    assert result.output == model / "ort"
    entry = json.loads((model / "ort" / "manifest.json").read_text())["stages"]["export ort"]
    assert entry["options"]["precision"] == "int8"
    assert entry["outputs"] == {"ort": compute_sha256(model / "ort" / "model.onnx")}
    packed, pair = verify(model, engine="ort").pairs
    assert (packed.a, packed.b, packed.tolerance) == ("torch", "ort-unpacked/torch", None)
    assert packed.max_abs_diff > 0
    assert (pair.a, pair.b, pair.ok) == ("ort-unpacked/torch", "ort", True)
    assert 0.5 < pair.top1_agreement <= 1


def test_an_option_of_another_engine_is_refused(tmp_path):
    model = make_tiny_model(tmp_path / "model", num_hidden_layers=1)
    with pytest.raises(LpdeployError, match="`opset` is no option of engine ort. Leave it out"):
        export(str(model), engine="ort", opset=18)
    with pytest.raises(LpdeployError, match="`block_size` is no option of engine onnx"):
        export(str(model), engine="onnx", block_size=32)


@pytest.mark.slow
def test_an_export_elsewhere_leaves_the_model_as_it_is(tmp_path):
    model = make_tiny_model(tmp_path / "model", num_hidden_layers=1)
    before = {path: path.read_bytes() for path in model.rglob("*")}
    export(str(model), output=tmp_path / "out")
    assert {path: path.read_bytes() for path in model.rglob("*")} == before
    assert "export out" in json.loads((tmp_path / "out" / "manifest.json").read_text())["stages"]
    export(str(model), output=tmp_path / "out", overwrite=True)


def test_an_adapter_is_not_left_out_without_a_word(tmp_path):
    """A pruned base beside its adapter is half of a model."""
    base = make_tiny_model(tmp_path / "base", num_hidden_layers=1)
    prune(str(base), tmp_path / "run", data=str(make_text(tmp_path / "a.txt")), options=OPTIONS)
    compact(tmp_path / "run", keep_adapter=True)
    with pytest.raises(ArtifactError, match=r"is a pruned base, whose adapter would be left out"):
        load_place(locate_model(tmp_path / "run" / "unmerged"), "torch")
