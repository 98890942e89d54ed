"""The ONNX runner: its cache, its devices, and folders that are not what they should be."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from lpdeploy.engines import ort_session
from lpdeploy.engines.onnx.runner import load_onnx_runner
from lpdeploy.errors import ArtifactError, MissingDependencyError
from tests.helpers import copy_export, make_batch, make_export


@pytest.fixture(scope="module")
def runner():
    return load_onnx_runner(make_export("per-layer")[2])


def edit_contract(folder, **changes):
    path = folder / "io.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_a_runner_says_of_itself(runner):
    assert (runner.name, runner.precision) == ("onnx", "fp32")
    assert (runner.vocab_size, runner.max_positions) == (300, 128)
    assert runner.provider == "CPUExecutionProvider"


def test_several_calls_go_on_from_one_past(runner):
    ids, mask = make_batch([7, 5], vocab_size=300)
    past = runner.forward(ids[:, :6], attention_mask=mask[:, :6]).past
    before = [value.numpy().copy() for value in past]
    first, second = (
        runner.forward(ids[:, 6:], attention_mask=mask, past=past).logits for _ in range(2)
    )
    assert torch.equal(first, second)
    assert all((a == b.numpy()).all() for a, b in zip(before, past, strict=True))


def test_logits_outlive_the_run_that_made_them(runner):
    ids, mask = make_batch([6], vocab_size=300)
    kept = runner.forward(ids, attention_mask=mask).logits
    copy = kept.clone()
    for seed in range(3):
        other, _ = make_batch([6], vocab_size=300, seed=seed + 1)
        runner.forward(other, attention_mask=mask)
    assert torch.equal(kept, copy)


def test_it_has_as_many_threads_as_torch(runner):
    options = runner._session.get_session_options()
    assert options.intra_op_num_threads == torch.get_num_threads()


def test_no_contract(tmp_path):
    with pytest.raises(ArtifactError, match=r"No io.json in .*Export it again"):
        load_onnx_runner(tmp_path)


def test_contract_of_something_else(tmp_path):
    (tmp_path / "io.json").write_text('{"engine": "trt"}')
    with pytest.raises(ArtifactError, match=r"no export for onnx. Export it again"):
        load_onnx_runner(tmp_path)


def test_contract_of_another_version(tmp_path):
    folder = copy_export("per-layer", tmp_path / "onnx")
    edit_contract(folder, schema_version=9)
    with pytest.raises(ArtifactError, match=r"schema version 9; .* reads 1. Export it"):
        load_onnx_runner(folder)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_missing_file(tmp_path, name):
    folder = copy_export("per-layer", tmp_path / "onnx")
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match=rf"No {name} in .*Export it again"):
        load_onnx_runner(folder)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_truncated_file(tmp_path, name):
    folder = copy_export("per-layer", tmp_path / "onnx")
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-100])
    with pytest.raises(ArtifactError, match=rf"{name}' has .* its export had {len(content)}. Copy"):
        load_onnx_runner(folder)


@pytest.mark.parametrize("damage", ["garbage", "short graph", "short data"])
def test_damage_that_the_size_does_not_tell(tmp_path, damage):
    folder = copy_export("per-layer", tmp_path / "onnx")
    graph, data = folder / "model.onnx", folder / "model.onnx.data"
    match damage:
        case "garbage":
            graph.write_bytes(b"\xff" * 5000)
        case "short graph":
            graph.write_bytes(graph.read_bytes()[:5000])
        case "short data":
            data.write_bytes(b"")
    edit_contract(folder, files={})
    with pytest.raises(ArtifactError, match=r"ONNX Runtime cannot load .*Export the model again"):
        load_onnx_runner(folder)


def test_bf16_does_not_run_on_a_cpu(tmp_path):
    folder = copy_export("per-layer", tmp_path / "onnx")
    edit_contract(folder, precision="bf16")
    with pytest.raises(ArtifactError, match=r"in bf16, .*`device=.cuda.`, or export in another"):
        load_onnx_runner(folder)


def test_unknown_device():
    with pytest.raises(ValueError, match="must be cpu, cuda or cuda:N"):
        load_onnx_runner(make_export("per-layer")[2], device="tpu")


def test_no_onnxruntime(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        MissingDependencyError, match=r"Install with: pip install 'lpdeploy\[cpu\]'"
    ):
        load_onnx_runner(make_export("per-layer")[2])


def test_no_cuda_provider(monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(
        MissingDependencyError, match=r"no CUDAExecutionProvider.*pip install 'lpdeploy\[gpu\]'"
    ):
        load_onnx_runner(make_export("per-layer")[2], device="cuda")


def test_cuda_provider_that_does_not_start(monkeypatch):
    # ONNX Runtime itself only warns, and would run the whole graph on the CPU.
    import onnxruntime

    session = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    fake = SimpleNamespace(
        SessionOptions=onnxruntime.SessionOptions,
        InferenceSession=lambda *_, **__: session,
    )
    monkeypatch.setattr(ort_session, "import_runtime", lambda _: fake)
    with pytest.raises(MissingDependencyError, match=r"cannot start it here.*lpdeploy\[gpu\]"):
        load_onnx_runner(make_export("per-layer")[2], device="cuda:1")
