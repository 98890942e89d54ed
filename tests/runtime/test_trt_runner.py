"""The TensorRT runner: real pointers and numbers over a fake engine, and what it refuses."""

import json

import pytest
import torch

from lpdeploy.errors import ArtifactError, LpdeployError
from lpdeploy.export import tensorrt as exporter
from lpdeploy.models.adapters import load_unmerged
from lpdeploy.models.loading import load_model
from lpdeploy.runtime import trt_runner
from lpdeploy.runtime.tensorrt_library import wrap_module
from lpdeploy.runtime.trt_runner import TrtRunner, choose_profile, load_trt_runner
from tests import fake_tensorrt
from tests.helpers import (
    EXPORTS,
    compute_reference,
    make_batch,
    make_export,
    run_with_cache,
)

# As for the graph in ONNX Runtime, which is what the fake engine runs.
ATOL = {"fp32": 2e-5, "fp16": 4e-2}


def make_engine(name, folder):
    """Build a fake engine from a shared export: its folder, as export_tensorrt leaves it."""
    graph = make_export(name)[2]
    library = wrap_module("tensorrt_rtx", fake_tensorrt.make_module())
    contract = json.loads((graph / "io.json").read_text())
    profiles = exporter.build_profiles(max_batch=4, max_seq_len=32)
    exporter.build_engine(
        library, graph / "model.onnx", folder, contract=contract, profiles=profiles
    )
    contract |= {
        "engine": "trt",
        "library": {"name": "tensorrt_rtx", "version": library.version},
        "compute_capability": "any",
        "max_batch": 4,
        "max_seq_len": 32,
        "profiles": profiles,
        "files": exporter._describe_files(folder),
    }
    (folder / "engine.json").write_text(json.dumps(contract))
    return folder


def open_engine(folder):
    """Open it as load_trt_runner does behind its checks, on the CPU."""
    contract = trt_runner._load_contract(folder)
    library = wrap_module("tensorrt_rtx", fake_tensorrt.make_module())
    engine = trt_runner._load_engine(folder, library)
    return TrtRunner(engine, contract, device=torch.device("cpu"), stream=fake_tensorrt.Stream())


@pytest.fixture(scope="module", params=EXPORTS)
def opened(request, tmp_path_factory):
    model, adapter, _ = make_export(request.param)
    folder = make_engine(request.param, tmp_path_factory.mktemp("trt"))
    return model, adapter, open_engine(folder)


@pytest.fixture
def folder(tmp_path):
    return make_engine("odd-heads", tmp_path)


@pytest.fixture
def installed(monkeypatch):
    """Make the fake library, and a GPU of capability 8.9, what is here."""
    module = fake_tensorrt.make_module()
    monkeypatch.setattr(trt_runner, "load_library", lambda name: wrap_module(name, module))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA L4")
    return module


def edit_contract(folder, **changes):
    path = folder / "engine.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("lengths", "chunks"),
    [([9, 4, 11], [7, 1, 1, 1, 1]), ([5], [1, 1, 1, 1, 1])],
    ids=["padded", "one-row"],
)
def test_logits_equal_transformers(opened, lengths, chunks):
    model_folder, adapter, runner = opened
    model = load_model(model_folder)
    if adapter is not None:
        model = load_unmerged(model, adapter)
    ids, mask = make_batch(lengths, vocab_size=runner.vocab_size)
    logits = run_with_cache(runner, ids, mask, chunks=chunks)
    expected = compute_reference(model, ids, mask)[mask.bool()]
    assert expected.abs().max() > 2
    torch.testing.assert_close(logits, expected, atol=ATOL[runner.precision], rtol=0)


def test_what_a_runner_says_of_itself(folder):
    runner = open_engine(folder)
    assert (runner.name, runner.precision, runner.vocab_size) == ("trt", "fp32", 72)
    assert runner.max_positions == 32


def test_each_profile_has_its_context(folder):
    runner = open_engine(folder)
    ids, mask = make_batch([6], vocab_size=72)
    past = runner.forward(ids[:, :4], attention_mask=mask[:, :4]).past
    assert [context.runs for context in runner._contexts] == [1, 0]
    for stop in (5, 6):
        past = runner.forward(
            ids[:, stop - 1 : stop], attention_mask=mask[:, :stop], past=past
        ).past
    assert [context.runs for context in runner._contexts] == [1, 2]


def test_only_the_last_logits(folder):
    runner = open_engine(folder)
    ids, mask = make_batch([6, 3], vocab_size=72)
    full = runner.forward(ids, attention_mask=mask).logits
    last = runner.forward(ids, attention_mask=mask, last_only=True).logits
    assert torch.equal(last, full[:, -1:])


def test_strided_inputs_are_read_right(folder):
    runner = open_engine(folder)
    ids, mask = make_batch([6, 6], vocab_size=72)
    expected = runner.forward(ids, attention_mask=mask).logits
    strided = torch.stack([ids, torch.zeros_like(ids)], dim=2)[:, :, 0]
    assert not strided.is_contiguous()
    assert torch.equal(runner.forward(strided, attention_mask=mask).logits, expected)


PROFILES = exporter.build_profiles(max_batch=4, max_seq_len=32)


@pytest.mark.parametrize(
    ("batch", "sequence", "past", "index"),
    [(1, 1, 0, 0), (4, 32, 0, 0), (1, 1, 1, 1), (4, 1, 31, 1)],
)
def test_profiles_admit_what_was_asked_for(batch, sequence, past, index):
    sizes = {"batch": batch, "sequence": sequence, "past": past, "total": past + sequence}
    assert choose_profile(PROFILES, sizes) == index


@pytest.mark.parametrize(
    ("batch", "sequence", "past", "sentence"),
    [
        (5, 8, 0, r"batch of 5 is more than the 4 .*export again with --max-batch 5"),
        (1, 33, 0, r"33 tokens are more than the 32 .*export again with --max-seq-len 33"),
        (1, 1, 32, r"33 tokens are more than the 32 .*Shorten the prompt"),
        (1, 2, 3, r"2 tokens after a past of 3 fit no profile .* one token after a past"),
    ],
)
def test_a_call_that_no_profile_admits(folder, batch, sequence, past, sentence):
    ids = torch.zeros(batch, sequence, dtype=torch.int64)
    mask = torch.ones(batch, past + sequence, dtype=torch.int64)
    with pytest.raises(LpdeployError, match=sentence):
        open_engine(folder).forward(ids, attention_mask=mask, past=[])


def test_an_engine_that_does_not_run(folder):
    runner = open_engine(folder)
    runner._contexts[0].valid = False
    ids, mask = make_batch([4], vocab_size=72)
    with pytest.raises(LpdeployError, match=r"does not run this engine .*Build it again with"):
        runner.forward(ids, attention_mask=mask)


def test_too_little_memory_for_a_context(folder):
    library = wrap_module("tensorrt_rtx", fake_tensorrt.make_module())
    engine = trt_runner._load_engine(folder, library)
    engine.memory = False
    with pytest.raises(LpdeployError, match=r"too little free memory .*smaller --max-batch"):
        TrtRunner(
            engine,
            trt_runner._load_contract(folder),
            device=torch.device("cpu"),
            stream=fake_tensorrt.Stream(),
        )


def test_loading_goes_through_all_checks(folder, installed, monkeypatch):
    monkeypatch.setattr(trt_runner, "Stream", lambda _: fake_tensorrt.Stream())
    made = []
    monkeypatch.setattr(
        trt_runner, "TrtRunner", lambda _, contract, **rest: made.append((contract, rest))
    )
    load_trt_runner(folder, device="cuda:1")
    [(contract, rest)] = made
    assert rest["device"] == torch.device("cuda:1")
    assert contract == json.loads((folder / "engine.json").read_text())


def test_no_gpu_here(folder, installed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LpdeployError, match=r"needs an NVIDIA GPU with its driver .*--engine onnx"):
        load_trt_runner(folder)


def test_built_by_another_version(folder, installed):
    installed.__version__ = "1.8.0"
    with pytest.raises(
        ArtifactError, match=r"built by tensorrt_rtx 1.7.1.116, and 1.8.0 is .*Build it again with"
    ):
        load_trt_runner(folder)


def test_built_for_another_gpu(folder, installed):
    edit_contract(folder, compute_capability="9.0")
    with pytest.raises(
        ArtifactError, match=r"compute capability 9.0; this one, NVIDIA L4, has 8.9. Build it again"
    ):
        load_trt_runner(folder)


def test_no_contract(tmp_path):
    with pytest.raises(ArtifactError, match=r"No engine.json in .*Build it again with"):
        load_trt_runner(tmp_path)


def test_contract_of_something_else(folder):
    edit_contract(folder, engine="onnx")
    with pytest.raises(ArtifactError, match=r"describes no TensorRT engine. Build it again"):
        load_trt_runner(folder)


def test_contract_of_another_version(folder):
    edit_contract(folder, schema_version=9)
    with pytest.raises(ArtifactError, match=r"schema version 9; .* reads 1. Build it again"):
        load_trt_runner(folder)


def test_missing_engine(folder):
    (folder / "model.engine").unlink()
    with pytest.raises(ArtifactError, match=r"No model.engine in .*Build it again"):
        load_trt_runner(folder)


def test_truncated_engine(folder):
    path = folder / "model.engine"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ArtifactError, match=r"has \d+ bytes, its export had \d+. Copy it again"):
        load_trt_runner(folder)


def test_corrupt_engine(folder, installed):
    path = folder / "model.engine"
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(
        ArtifactError, match=r"cannot load .*Serialization assertion failed. Build it again"
    ):
        load_trt_runner(folder)


def test_not_on_a_cpu(folder):
    with pytest.raises(ValueError, match="device is 'cpu'; .* runs on cuda or cuda:N"):
        load_trt_runner(folder, device="cpu")
