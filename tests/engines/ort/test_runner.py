"""The cache of the ort runner, and folders that are not what they should be."""

import json

import pytest
import torch

from lpdeploy.engines.generation import generate
from lpdeploy.engines.onnx.runner import load_onnx_runner
from lpdeploy.engines.ort.exporter import export_ort
from lpdeploy.engines.ort.runner import load_ort_runner
from lpdeploy.engines.runner import pad_left
from lpdeploy.errors import ArtifactError, LpdeployError
from lpdeploy.models.loading import load_model
from tests.helpers import make_batch, make_tiny_model

PROMPTS = [[5, 17, 40], [9], [33, 2, 8, 61, 7, 29, 11]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("ort")
    model = make_tiny_model(root / "model", head_dim=16, kv_heads=2)
    export_ort(model, root / "ort", max_seq_len=40)
    return model, root / "ort"


@pytest.fixture(scope="module")
def runner(folders):
    return load_ort_runner(folders[1])


def test_what_a_runner_says_of_itself(runner):
    assert (runner.name, runner.precision) == ("ort", "fp32")
    assert (runner.vocab_size, runner.max_positions) == (72, 40)


def decode(runner, *, reserve):
    """Addresses and capacities of the cache over eight decoded tokens, and their logits."""
    ids, mask = make_batch([9, 4], vocab_size=72)
    output = runner.forward(ids, attention_mask=mask, reserve=reserve)
    places, logits = [], []
    for _ in range(8):
        cache = output.past
        places.append(([buffer.data_ptr() for buffer in cache.buffers], cache.capacity))
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], dim=1)
        token = torch.full((2, 1), 7)
        output = runner.forward(token, attention_mask=mask, past=cache, last_only=True)
        logits.append(output.logits)
    return places, torch.cat(logits, dim=1), output.past


def test_a_cache_with_room_stays_where_it_is(runner):
    places, _, cache = decode(runner, reserve=8)
    assert all(place == places[0] for place in places)
    assert places[0][1] == 17
    assert cache.lengths == [17, 12]


def test_a_cache_without_room_doubles(runner):
    places, logits, _ = decode(runner, reserve=0)
    assert [capacity for _, capacity in places] == [9, *[20] * 7]
    _, expected, _ = decode(runner, reserve=8)
    assert torch.equal(logits, expected)


def test_what_the_caller_gave_is_left_alone(runner):
    ids = torch.tensor([[5, 17, 40]])
    past = runner.forward(ids, attention_mask=torch.ones(1, 3, dtype=torch.int64), reserve=2).past
    tokens = [torch.tensor([[9]]), torch.tensor([[33]])]
    for count, token in enumerate(tokens, start=4):
        mask = torch.ones(1, count, dtype=torch.int64)
        past = runner.forward(token, attention_mask=mask, past=past).past
    assert [token.item() for token in tokens] == [9, 33]
    assert ids.tolist() == [[5, 17, 40]]


def test_logits_of_a_step_outlive_the_next(runner):
    ids = torch.tensor([[5, 17, 40]])
    output = runner.forward(ids, attention_mask=torch.ones(1, 3, dtype=torch.int64), reserve=2)
    kept, copies = [], []
    for count, token in enumerate((9, 33), start=4):
        mask = torch.ones(1, count, dtype=torch.int64)
        output = runner.forward(torch.tensor([[token]]), attention_mask=mask, past=output.past)
        kept.append(output.logits)
        copies.append(output.logits.clone())
    assert all(map(torch.equal, kept, copies))
    assert not torch.equal(*kept)


def test_greedy_equals_transformers(folders, tmp_path):
    export_ort(folders[0], tmp_path / "ort")
    runner = load_ort_runner(tmp_path / "ort")
    model = load_model(folders[0])
    model.generation_config.eos_token_id = None
    ids, mask = pad_left(PROMPTS)
    written = model.generate(
        ids, attention_mask=mask, max_new_tokens=64, do_sample=False, pad_token_id=0
    )
    expected = written[:, ids.shape[1] :].tolist()
    assert generate(runner, PROMPTS, max_new_tokens=64, eos_ids=set()) == expected
    assert len({tuple(row) for row in expected}) == 3


def test_a_prompt_longer_than_the_export_allows(runner):
    ids, mask = make_batch([41], vocab_size=72)
    with pytest.raises(LpdeployError, match="41 tokens do not fit an export for 40. Shorten"):
        runner.forward(ids, attention_mask=mask)


def test_a_cache_grows_no_further_than_the_export_allows(runner):
    ids, mask = make_batch([39], vocab_size=72)
    past = runner.forward(ids[:, :38], attention_mask=mask[:, :38], reserve=100).past
    assert past.capacity == 40


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_a_file_that_was_cut_short(folders, tmp_path, name):
    copy = tmp_path / "ort"
    copy.mkdir()
    for path in folders[1].iterdir():
        data = path.read_bytes()
        (copy / path.name).write_bytes(data[:-8] if path.name == name else data)
    with pytest.raises(ArtifactError, match=f"{name}' has .* bytes, its export had .* Copy it ag"):
        load_ort_runner(copy)


def test_a_graph_that_is_damaged_but_of_the_right_size(folders, tmp_path):
    copy = tmp_path / "ort"
    copy.mkdir()
    for path in folders[1].iterdir():
        data = path.read_bytes()
        (copy / path.name).write_bytes(bytes(len(data)) if path.name == "model.onnx" else data)
    with pytest.raises(ArtifactError, match="ONNX Runtime cannot load .* Export the model again"):
        load_ort_runner(copy)


def test_an_export_for_another_engine(folders, tmp_path):
    contract = json.loads((folders[1] / "io.json").read_text())
    assert contract["engine"] == "ort"
    with pytest.raises(ArtifactError, match="io.json' describes no export for onnx. Export it ag"):
        load_onnx_runner(folders[1])
