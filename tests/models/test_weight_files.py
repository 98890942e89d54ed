"""Which file holds which weight: ties, indexes and what is wrong with them, for every reader."""

import json
import shutil
from importlib import resources
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lpdeploy.engines.export import export_folder
from lpdeploy.engines.ort.runner import load_ort_runner as load_ort
from lpdeploy.engines.torch.runner import load_torch_runner
from lpdeploy.engines.verify import build_inputs, collect_logits
from lpdeploy.errors import ArtifactError
from lpdeploy.models.compact import compact
from lpdeploy.models.find import list_weight_files
from lpdeploy.models.loading import load_config, load_model
from lpdeploy.models.shapes import count_parameters
from lpdeploy.models.weight_files import EMBEDDING, HEAD, index_weights
from lpdeploy.pruning.setup import load_source
from tests.helpers import make_tiny_model
from tests.models.families import choose_kept, make_run

DEMO = Path(str(resources.files("lpdeploy.demo"))) / "assets" / "story-llama-1M"


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


TIES = {
    "embedding": lambda _: None,
    "head": lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}),
    "both": lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}),
    "both, unlike": lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].flip(0).clone()}),
}


@pytest.fixture(params=TIES)
def tied(request, tmp_path):
    """A tied model as it may be stored, and whether its weights are one."""
    base = make_tiny_model(
        tmp_path / "base", head_dim=16, heads=4, kv_heads=2, intermediate_size=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    edit(base, TIES[request.param])
    return base, request.param != "both, unlike"


def compute_expected(folder):
    """Logits of transformers, which finds out by itself."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = build_inputs(model.config.vocab_size, limit=64)
    return [model(torch.tensor([row])).logits[0].detach() for row in rows]


def compare(runner, expected):
    rows = build_inputs(runner.vocab_size, limit=64)
    for row, logits in zip(rows, expected, strict=True):
        own = collect_logits(runner, [row])
        # float32 sums of a small model in another order.
        torch.testing.assert_close(own, logits, atol=2e-5, rtol=1e-5)


def test_every_reader_computes_what_transformers_does(tied, tmp_path):
    base, one = tied
    config = load_config(base)
    assert config.tie_word_embeddings is one
    assert (index_weights(base, config)[EMBEDDING] == index_weights(base, config)[HEAD]) is (
        one and len(set(load_file(base / "model.safetensors")) & {EMBEDDING, HEAD}) == 1
    )
    whole = load_model(base)
    assert count_parameters(config) == sum(p.numel() for p in whole.parameters())
    expected = compute_expected(base)
    compare(load_torch_runner(base), expected)
    export_folder("ort", base, tmp_path / "ort")
    compare(load_ort(tmp_path / "ort"), expected)
    export_folder("onnx", base, tmp_path / "onnx")


def test_what_is_compacted_of_it_is_exported_too(tied, tmp_path):
    base, one = tied
    run = make_run(tmp_path / "run", base, choose_kept(base, heads=1, channels=32))
    compact(run)
    model = run / "model"
    assert load_config(model).tie_word_embeddings is one
    export_folder("ort", model, tmp_path / "ort")
    compare(load_ort(tmp_path / "ort"), compute_expected(model))


@pytest.mark.parametrize("name", TIES)
def test_a_gguf_file_has_a_head_of_its_own_where_the_model_has(name, tmp_path):
    gguf = pytest.importorskip("gguf")
    from lpdeploy.servers.gguf_file import save_gguf

    base = tmp_path / "base"
    shutil.copytree(DEMO, base)  # which has a tokenizer of llama.cpp's
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    edit(base, lambda tensors: tensors.pop(HEAD, None))
    edit(base, TIES[name])
    save_gguf(base, tmp_path / "model.gguf", name="tiny", precision="fp32")
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert ("output.weight" in names) is (name == "both, unlike")
    assert "token_embd.weight" in names


INDEXES = {
    "a list": "[]",
    "no map": "{}",
    "an empty map": '{"weight_map": {}}',
    "a number": '{"weight_map": {"a": 1}}',
    "another folder": '{"weight_map": {"a": "../other/model.safetensors"}}',
    "an absolute path": '{"weight_map": {"a": "/etc/passwd"}}',
}


@pytest.mark.parametrize("text", INDEXES.values(), ids=INDEXES)
def test_an_index_names_files_beside_it(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ArtifactError, match="cannot be used: |names no weights|no file beside it"):
        list_weight_files(tmp_path)


def shard(folder, *parts):
    """Store a model as several files."""
    whole = folder / "model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    names = [f"model-{number}.safetensors" for number in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        save_file({key: tensors[key] for key in part(tensors)}, folder / name, {"format": "pt"})
    weights = dict.fromkeys(tensors, names[0])
    for name, part in zip(names, parts, strict=True):
        weights |= dict.fromkeys(part(tensors), name)
    index = {"metadata": {}, "weight_map": weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_weight_in_two_files_is_refused_before_training(tmp_path):
    from lpdeploy.config import PruneConfig

    base = make_tiny_model(tmp_path / "base")
    shard(base, sorted, lambda tensors: sorted(tensors)[:2])
    with pytest.raises(ArtifactError, match="twice, in model-0.safetensors and model-1.safeten"):
        load_source(str(base), PruneConfig(seq_len=16, round_to=1))


def test_weights_without_their_prefix_are_refused_before_training(tmp_path):
    from lpdeploy.config import PruneConfig

    base = make_tiny_model(tmp_path / "base")
    edit(base, lambda tensors: [tensors.update({name.removeprefix("model."): tensors.pop(name)})
                                for name in list(tensors)])  # fmt: skip
    AutoModelForCausalLM.from_pretrained(base)  # transformers finds them
    with pytest.raises(ArtifactError, match="by the names of its class.*save_pretrained"):
        load_source(str(base), PruneConfig(seq_len=16, round_to=1))


def test_several_files_are_one_model(tmp_path):
    base = make_tiny_model(tmp_path / "base")
    whole = tmp_path / "whole"
    shutil.copytree(base, whole)
    shard(base, lambda t: sorted(t)[::2], lambda t: sorted(t)[1::2])
    stored = index_weights(base, load_config(base))
    for name, tensor in load_file(whole / "model.safetensors").items():
        assert torch.equal(stored[name].load(), tensor), name
