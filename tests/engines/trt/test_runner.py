"""The TensorRT runner: real pointers and numbers over a fake engine, and what it refuses."""

import json
from dataclasses import replace

import pytest
import torch

from lpdeploy.engines import ONNX, TRT
from lpdeploy.engines.contract import BuildRecord, LibraryRecord, load_contract, save_contract
from lpdeploy.engines.exporting import describe_files
from lpdeploy.engines.trt import exporter
from lpdeploy.engines.trt import runner as trt_runner
from lpdeploy.engines.trt.library import wrap_module
from lpdeploy.engines.trt.runner import TrtRunner, choose_profile, load_trt_runner
from lpdeploy.errors import ArtifactError, LpdeployError
from lpdeploy.models.adapters import load_unmerged
from lpdeploy.models.loading import load_model
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
PROFILES = {
    cache: exporter.build_profiles(max_batch=4, max_seq_len=32, in_place=cache == "in-place")
    for cache in ("concat", "in-place")
}


def make_engine(name, folder, *, cache="concat"):
    """Build a fake engine from a shared export: its folder, as export_tensorrt leaves it."""
    graph = make_export(name, in_place=cache == "in-place")[2]
    library = wrap_module("tensorrt_rtx", fake_tensorrt.make_module())
    contract = load_contract(graph, ONNX)
    profiles = PROFILES[cache]
    exporter.build_engine(
        library, graph / "model.onnx", folder, contract=contract, profiles=profiles
    )
    made_by = LibraryRecord("tensorrt_rtx", library.version)
    contract = replace(
        contract,
        engine="trt",
        max_batch=4,
        max_seq_len=32,
        files=describe_files(folder, "model.engine"),
        build=BuildRecord(made_by, "any", cache, profiles, 0.5),
    )
    save_contract(contract, folder, TRT)
    return folder


def open_engine(folder, *, captures_graphs=True):
    """Open it as load_trt_runner does behind its checks, on the CPU."""
    contract = load_contract(folder, TRT)
    module = fake_tensorrt.make_module()
    if not captures_graphs:  # as TensorRT, whose contexts are captured from outside
        del module.CudaGraphStrategy
    library = wrap_module("tensorrt_rtx", module)
    return TrtRunner(
        library,
        trt_runner._load_engine(folder, library),
        contract,
        device=torch.device("cpu"),
        stream=fake_tensorrt.Stream(),
    )


@pytest.fixture(
    scope="module", params=[f"{name} {cache}" for cache in PROFILES for name in EXPORTS]
)
def opened(request, tmp_path_factory):
    name, cache = request.param.split()
    model, adapter, _ = make_export(name)
    folder = make_engine(name, tmp_path_factory.mktemp("trt"), cache=cache)
    return model, adapter, open_engine(folder)


@pytest.fixture
def folder(tmp_path):
    return make_engine("odd-heads", tmp_path)


@pytest.fixture
def in_place(tmp_path):
    return make_engine("odd-heads", tmp_path, cache="in-place")


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


@pytest.mark.slow
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
    assert [context.runs for context in runner._contexts.values()] == [1, 0]
    for stop in (5, 6):
        past = runner.forward(
            ids[:, stop - 1 : stop], attention_mask=mask[:, :stop], past=past
        ).past
    assert [context.runs for context in runner._contexts.values()] == [1, 2]


@pytest.mark.slow
def test_tokens_in_chunks_of_any_length(in_place):
    runner = open_engine(in_place)
    ids, mask = make_batch([9, 4], vocab_size=72)
    whole = run_with_cache(runner, ids, mask, chunks=[9])
    for chunks in ([4, 5], [1, 3, 1, 4]):
        logits = run_with_cache(runner, ids, mask, chunks=chunks)
        torch.testing.assert_close(logits, whole, atol=ATOL["fp32"], rtol=0)


def test_buffers_stay_where_they_are(in_place):
    runner = open_engine(in_place)
    ids, mask = make_batch([6], vocab_size=72)
    past = runner.forward(ids[:, :4], attention_mask=mask[:, :4]).past
    assert all(buffer[:, :, 4:].eq(0).all() for buffer in past.buffers)  # nothing beyond the tokens
    before = [buffer.data_ptr() for buffer in past.buffers]
    first = runner.forward(ids[:, 4:5], attention_mask=mask[:, :5], past=past)
    held = first.logits.clone()
    addresses = dict(runner._contexts["decode"].addresses)
    second = runner.forward(ids[:, 5:], attention_mask=mask, past=first.past)
    assert runner._contexts["decode"].addresses == addresses
    assert [buffer.data_ptr() for buffer in second.past.buffers] == before
    assert second.past.length == 6
    assert torch.equal(first.logits, held)  # the caller's logits are no buffer


@pytest.mark.parametrize("captures_graphs", [True, False], ids=["by-itself", "from-outside"])
def test_decoding_is_captured(captures_graphs, in_place):
    runner = open_engine(in_place, captures_graphs=captures_graphs)
    ids, mask = make_batch([8], vocab_size=72)
    expected = run_with_cache(open_engine(in_place), ids, mask, chunks=[8])
    logits = run_with_cache(runner, ids, mask, chunks=[4, 1, 1, 1, 1])
    torch.testing.assert_close(logits, expected, atol=ATOL["fp32"], rtol=0)
    assert runner._contexts["decode"].runs == 4
    strategies = [
        context.config and context.config.cuda_graph_strategy.name
        for context in runner._contexts.values()
    ]
    assert strategies == [None, "WHOLE_GRAPH_CAPTURE" if captures_graphs else None]
    assert runner._stream.captured == (0 if captures_graphs else 1)


def test_two_caches_take_turns(in_place):
    runner = open_engine(in_place, captures_graphs=False)
    batches = [make_batch([6], vocab_size=72, seed=seed) for seed in (1, 2)]
    whole = [run_with_cache(runner, ids, mask, chunks=[6]) for ids, mask in batches]
    pasts = [runner.forward(ids[:, :3], attention_mask=mask[:, :3]).past for ids, mask in batches]
    for stop in (4, 5, 6):
        for (ids, mask), past, expected in zip(batches, pasts, whole, strict=True):
            output = runner.forward(
                ids[:, stop - 1 : stop], attention_mask=mask[:, :stop], past=past
            )
            torch.testing.assert_close(
                output.logits[0], expected[stop - 1 : stop], atol=ATOL["fp32"], rtol=0
            )
    assert runner._stream.captured == 6  # a captured step is of one cache


def test_a_past_that_another_call_has_gone_on_from(in_place):
    runner = open_engine(in_place)
    ids, mask = make_batch([6], vocab_size=72)
    past = runner.forward(ids[:, :4], attention_mask=mask[:, :4]).past
    runner.forward(ids[:, 4:5], attention_mask=mask[:, :5], past=past)
    with pytest.raises(ValueError, match="the cache holds 5 tokens, the attention mask has 4"):
        runner.forward(ids[:, 4:5], attention_mask=mask[:, :5], past=past)


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


@pytest.mark.parametrize(
    ("cache", "batch", "sequence", "past", "name"),
    [
        ("concat", 1, 1, 0, "prefill"),
        ("concat", 4, 32, 0, "prefill"),
        ("concat", 1, 1, 1, "decode"),
        ("concat", 4, 1, 31, "decode"),
        ("in-place", 1, 1, 0, "decode"),
        ("in-place", 4, 32, 0, "prefill"),
        ("in-place", 2, 2, 30, "prefill"),
        ("in-place", 4, 1, 31, "decode"),
    ],
)
def test_profiles_admit_what_was_asked_for(cache, batch, sequence, past, name):
    sizes = {"batch": batch, "sequence": sequence, "past": past, "total": past + sequence}
    assert choose_profile(PROFILES[cache], sizes) == name


@pytest.mark.parametrize(
    ("batch", "sequence", "past", "sentence"),
    [
        (5, 8, 0, r"batch of 5 is more than the 4 .*export again with `max_batch=5`"),
        (1, 33, 0, r"33 tokens are more than the 32 .*export again with `max_seq_len=33`"),
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
    runner._contexts["prefill"].valid = False
    ids, mask = make_batch([4], vocab_size=72)
    with pytest.raises(LpdeployError, match=r"does not run this engine .*Export it again with"):
        runner.forward(ids, attention_mask=mask)


def test_too_little_memory_for_a_context(folder):
    library = wrap_module("tensorrt_rtx", fake_tensorrt.make_module())
    engine = trt_runner._load_engine(folder, library)
    engine.memory = False
    with pytest.raises(LpdeployError, match=r"too little free memory .*smaller `max_batch`"):
        TrtRunner(
            library,
            engine,
            load_contract(folder, TRT),
            device=torch.device("cpu"),
            stream=fake_tensorrt.Stream(),
        )


def test_loading_goes_through_all_checks(folder, installed, monkeypatch):
    monkeypatch.setattr(trt_runner, "Stream", lambda _: fake_tensorrt.Stream())
    made = []
    monkeypatch.setattr(
        trt_runner, "TrtRunner", lambda _, __, contract, **rest: made.append((contract, rest))
    )
    load_trt_runner(folder, device="cuda:1")
    [(contract, rest)] = made
    assert rest["device"] == torch.device("cuda:1")
    assert contract == load_contract(folder, TRT)


def test_no_gpu_here(folder, installed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        LpdeployError, match=r"needs an NVIDIA GPU with its driver .*another `engine`"
    ):
        load_trt_runner(folder)


def test_built_by_another_version(folder, installed):
    installed.__version__ = "1.8.0"
    with pytest.raises(
        ArtifactError, match=r"built by tensorrt_rtx 1.7.1.116, and 1.8.0 is .*Export it again with"
    ):
        load_trt_runner(folder)


def test_built_for_another_gpu(folder, installed):
    edit_contract(folder, compute_capability="9.0")
    with pytest.raises(
        ArtifactError,
        match=r"compute capability 9.0; this one, NVIDIA L4, has 8.9. Export it again",
    ):
        load_trt_runner(folder)


def test_no_contract(tmp_path):
    with pytest.raises(ArtifactError, match=r"No engine.json in .*Export it again with"):
        load_trt_runner(tmp_path)


def test_contract_of_something_else(folder):
    edit_contract(folder, engine="onnx")
    with pytest.raises(ArtifactError, match=r"describes no export for trt. Export it again"):
        load_trt_runner(folder)


def test_contract_of_another_version(folder):
    edit_contract(folder, schema_version=9)
    with pytest.raises(ArtifactError, match=r"schema version 9; .* reads 1. Export it again"):
        load_trt_runner(folder)


def test_missing_engine(folder):
    (folder / "model.engine").unlink()
    with pytest.raises(ArtifactError, match=r"No model.engine in .*Export it again"):
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
        ArtifactError, match=r"cannot load .*Serialization assertion failed. Export it again"
    ):
        load_trt_runner(folder)


def test_not_on_a_cpu(folder):
    with pytest.raises(ValueError, match="device is 'cpu'; .* runs on cuda or cuda:N"):
        load_trt_runner(folder, device="cpu")
