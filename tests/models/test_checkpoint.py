"""Streaming a base into a pruned checkpoint: its tensors, its shards, its memory, its errors."""

import hashlib
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lpdeploy.errors import ArtifactError
from lpdeploy.models import tensor_files
from lpdeploy.models.adapters import LoraWeights, load_adapter
from lpdeploy.models.checkpoint import (
    CARRIED_FILES,
    carry_files,
    check_weights,
    compute_pruned_layout,
    save_shards,
    stream_pruned_blocks,
)
from lpdeploy.models.loading import load_config, load_model
from lpdeploy.models.run_weights import RunWeights
from lpdeploy.models.weight_files import index_weights
from tests.models.families import (
    FAMILIES,
    choose_kept,
    keep_all,
    list_positions,
    load_factors,
    make_base,
    make_plan,
    make_run,
)

every_family = pytest.mark.parametrize("family", FAMILIES)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def stream(base, plan, lora):
    """Read a pruned model whole, and check that it is what its layout says."""
    weights = RunWeights(lora)
    layout, parts = compute_pruned_layout(base, plan, weights), {}
    for name, rows in stream_pruned_blocks(base, plan, weights, hashes={}):
        parts.setdefault(name, []).append(rows)  # which must stay as they are
    tensors = {name: torch.cat(rows) for name, rows in parts.items()}
    assert {name: info.shape for name, info in layout.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    return tensors


@pytest.fixture(params=["whole", "rows"], autouse=True)
def block_bytes(request, monkeypatch):
    """Tiny tensors are one block each; with blocks of 300 bytes they are many."""
    if request.param == "rows":
        monkeypatch.setattr(tensor_files, "BLOCK_BYTES", 300)


@every_family
@both_dtypes
def test_a_ratio_of_zero_gives_the_tensors_of_the_base(bases, family, dtype):
    base = bases(family, dtype)
    streamed = stream(base, make_plan(base, keep_all(base)), {})
    assert_same_tensors(streamed, load_file(base / "model.safetensors"))


def assert_same_tensors(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


@every_family
@both_dtypes
def test_without_an_adapter_the_weights_that_stay_are_copied(bases, family, dtype):
    base = bases(family, dtype)
    kept = choose_kept(base, heads=[3, 2], channels=[20, 31])
    plan = make_plan(base, kept)
    assert_same_tensors(stream(base, plan, {}), cut_by_hand(base, plan))


@every_family
@pytest.mark.parametrize("dropped", [0, 1])
def test_a_layer_of_which_no_group_stays_is_left_out(bases, family, dropped):
    base = bases(family, torch.float32)
    counts = [[3, 20], [3, 20]]
    counts[dropped] = [0, 0]
    heads, channels = zip(*counts, strict=True)
    plan = make_plan(base, choose_kept(base, heads=list(heads), channels=list(channels)))
    left = {
        name.replace("layers.1.", "layers.0."): tensor
        for name, tensor in cut_by_hand(base, plan).items()
        if f"layers.{dropped}." not in name
    }
    assert_same_tensors(stream(base, plan, {}), left)


def cut_by_hand(base, plan):
    """Take what stays of each weight of a base, one row or column after the other."""
    expected = load_file(base / "model.safetensors")
    for spec in plan.kept_specs:
        for piece in spec.slices:
            positions = list_positions(plan.kept[spec.name], piece.block)
            for leaf in ("weight", "bias"):
                name = f"{piece.module}.{leaf}"
                if name in expected and not (leaf == "bias" and piece.dim == 1):
                    rows = expected[name].unbind(piece.dim)
                    expected[name] = torch.stack([rows[p] for p in positions], dim=piece.dim)
    return expected


@every_family
@both_dtypes
def test_lora_is_merged_in_float32_and_rounded_once(bases, family, dtype, tmp_path):
    base = bases(family, dtype)
    kept = choose_kept(base, heads=[3, 2], channels=[20, 31])
    run = make_run(tmp_path / "run", base, kept)
    plan = make_plan(base, kept)
    cut = stream(base, plan, {})
    merged = stream(base, plan, load_adapter(run / "adapter"))
    assert merged.keys() == cut.keys()
    factors = load_factors(run / "adapter")
    for name, weight in cut.items():
        module = name.removesuffix(".weight")
        if module not in factors:
            assert torch.equal(merged[name], weight), name
            continue
        lora_a, lora_b, scaling = factors[module]
        exact = weight.double() + scaling * lora_b.double() @ lora_a.double()
        # float32 sums five terms of at most 2 (five units of 2**-24 each); bf16 then rounds once,
        # by half of its last bit: 2**-8 of the power of two below.
        bound = torch.full_like(exact, 5 * 2 * 2**-24)
        if dtype == torch.bfloat16:
            bound += 2.0 ** exact.abs().log2().floor() * 2**-8
        assert merged[name].dtype == dtype
        assert ((merged[name].double() - exact).abs() <= bound).all(), name
        if dtype == torch.bfloat16:  # what merging in bf16 would give is further away
            rough = weight + (scaling * lora_b.bfloat16() @ lora_a.bfloat16())
            assert ((rough.double() - exact).abs() > bound).any(), name


def test_a_base_in_shards_gives_the_same_tensors(bases, tmp_path):
    load_model(bases("llama-bias")).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    plan = make_plan(tmp_path, choose_kept(tmp_path, heads=[3, 2], channels=[20, 31]))
    expected = stream(bases("llama-bias"), plan, {})
    assert_same_tensors(stream(tmp_path, plan, {}), expected)


def test_the_tables_of_old_checkpoints_are_dropped(tmp_path):
    base = make_base(tmp_path / "base", "llama-mha")
    expected = load_file(base / "model.safetensors")
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file({**expected, **table}, base / "model.safetensors", metadata={"format": "pt"})
    streamed = stream(base, make_plan(base, keep_all(base)), {})
    assert_same_tensors(streamed, expected)


def test_a_missing_weight_is_named(tmp_path):
    base = make_base(tmp_path / "base", "llama-mha")
    tensors = load_file(base / "model.safetensors")
    for gone in ("q_proj", "up_proj"):
        del tensors[f"model.layers.1.{'mlp' if 'up' in gone else 'self_attn'}.{gone}.weight"]
    save_file(tensors, base / "model.safetensors")
    plan = make_plan(base, keep_all(base))
    with pytest.raises(
        ArtifactError, match=r"lacks 2 weights of its plan, first .*up_proj.* Give the complete"
    ):
        stream(base, plan, {})
    with pytest.raises(
        ArtifactError, match=r"lacks 2 weights by the names of its class, first .*up_proj.* Load it"
    ):
        check_weights(base, load_config(base), plan.specs)


@pytest.mark.parametrize("size", [4, -100])  # within the header, within the last tensor
def test_a_truncated_file_is_refused(tmp_path, size):
    base = make_base(tmp_path / "base", "llama-mha")
    plan = make_plan(base, keep_all(base))
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ArtifactError, match=r"cannot be read: .* Copy the checkpoint anew"):
        stream(base, plan, {})


def test_a_shard_that_is_not_there_is_refused(bases, tmp_path):
    load_model(bases("llama-mha")).save_pretrained(tmp_path, max_shard_size="20KB")
    plan = make_plan(tmp_path, keep_all(tmp_path))
    min(tmp_path.glob("model-*.safetensors")).unlink()
    with pytest.raises(ArtifactError, match=r"cannot be read: .* Copy the checkpoint anew"):
        stream(tmp_path, plan, {})


@pytest.mark.parametrize("shapes", [((4, 31), (48, 4)), ((4, 32), (47, 4))])
def test_factors_of_other_shapes_are_refused(bases, shapes):
    base = bases("llama-mha")
    lora_a, lora_b = (torch.zeros(shape) for shape in shapes)
    lora = {"model.layers.1.mlp.up_proj": LoraWeights(lora_a, lora_b, 1.0)}
    with pytest.raises(ArtifactError, match=r"up_proj.weight has shape .* are of different runs"):
        stream(base, make_plan(base, keep_all(base)), lora)


def make_tensors(count, *, rows=100):
    generator = torch.Generator().manual_seed(0)
    return {f"tensor{n}": torch.randn(rows, generator=generator) for n in range(count)}


def save(folder, tensors, *, max_shard_bytes):
    """Save tensors through a file of their own, as compact saves those of a base."""
    source = folder.parent / "source.safetensors"
    save_file(tensors, source, metadata={"format": "pt"})
    layout = tensor_files.load_layout(source)
    blocks = ((n, rows) for n, _, rows in tensor_files.iterate_blocks(source, hashes={}))
    return save_shards(folder, layout, blocks, max_shard_bytes=max_shard_bytes)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


def test_one_shard_needs_no_index(folder):
    hashes = save(folder, make_tensors(5), max_shard_bytes=2000)
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
    assert_same_tensors(load_file(folder / "model.safetensors"), make_tensors(5))
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses a file without
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert hashes == {"model.safetensors": digest}


def test_shards_are_bounded_and_listed(folder):
    hashes = save(folder, make_tensors(5), max_shard_bytes=800)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 400
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    read = {}
    for file in files:
        tensors = load_file(folder / file)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 800
        assert all(index["weight_map"][name] == file for name in tensors)
        assert hashes[file] == hashlib.sha256((folder / file).read_bytes()).hexdigest()
        read |= tensors
    assert_same_tensors(read, make_tensors(5))
    assert len(list(folder.iterdir())) == 4


def test_two_shards_need_an_index(folder):
    save(folder, make_tensors(2), max_shard_bytes=400)
    names = index_weights(folder, SimpleNamespace(tie_word_embeddings=False))
    assert {name: weight.file.name for name, weight in names.items()} == {
        "tensor0": "model-00001-of-00002.safetensors",
        "tensor1": "model-00002-of-00002.safetensors",
    }


def test_a_tensor_larger_than_a_shard_gets_its_own(folder):
    save(folder, make_tensors(3), max_shard_bytes=1)
    assert len(list(folder.glob("*.safetensors"))) == 3


def test_every_type_of_number_comes_back(tmp_path):
    for name, dtype in tensor_files._DTYPES.items():
        tensors = {
            "matrix": (100 * torch.rand(7, 33)).to(dtype),
            "scalar": torch.ones(()).to(dtype),
            "nothing": torch.zeros(0, 4).to(dtype),
        }
        folder = tmp_path / name
        folder.mkdir()
        save(folder, tensors, max_shard_bytes=10_000)
        assert_same_tensors(load_file(folder / "model.safetensors"), tensors)


def test_numbers_begin_at_multiples_of_their_size(folder):
    # A pruned bfloat16 tensor of odd length cannot stand before a float32 one in the same file.
    layout = {
        "odd": tensor_files.TensorInfo("BF16", (3,)),
        "wide": tensor_files.TensorInfo("F32", (2,)),
    }
    tensors = {"odd": torch.ones(3, dtype=torch.bfloat16), "wide": torch.ones(2)}
    save_shards(folder, layout, iter(tensors.items()), max_shard_bytes=1000)
    read = {}
    for file in sorted(folder.glob("*.safetensors")):
        read |= load_file(file)
    assert_same_tensors(read, tensors)


def test_a_block_that_does_not_belong_is_refused(folder):
    layout = {"one": tensor_files.TensorInfo("F32", (2,))}
    for name, rows in (("other", torch.ones(2)), ("one", torch.ones(3))):
        with pytest.raises(ValueError, match=f"a block of {name} does not fit into one"):
            save_shards(folder, layout, iter([(name, rows)]), max_shard_bytes=1000)


def test_an_unknown_type_of_number_is_refused(tmp_path):
    tensors = {"eighth": torch.zeros(4, dtype=torch.float8_e4m3fn)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ArtifactError, match="holds eighth as F8_E4M3, which is not read. Save the"):
        tensor_files.load_layout(tmp_path / "a.safetensors")


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_file(make_tensors(2, rows=1000), path)
    monkeypatch.setattr(tensor_files, "BLOCK_BYTES", 400)
    blocks = tensor_files.iterate_blocks(path, hashes={})
    next(blocks)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ArtifactError, match="cannot be read: it ended early"):
        list(blocks)


@pytest.mark.slow
def test_memory_is_blocks_and_neither_tensors_nor_a_model(tmp_path):
    """A process of its own compacts 200 MB, tensors of 32 MB each; its peak grows by far less."""
    tensors = {f"t{n}": torch.zeros(4096, 2048) for n in range(6)}
    save_file(tensors, tmp_path / "source.safetensors", metadata={"format": "pt"})
    code = """
import resource, sys
from pathlib import Path
from lpdeploy.models.checkpoint import save_shards
from lpdeploy.models.tensor_files import iterate_blocks, load_layout
source = Path(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
blocks = ((n, rows) for n, _, rows in iterate_blocks(source, hashes={}))
save_shards(source.parent, load_layout(source), blocks, max_shard_bytes=1 << 30)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "source.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown = int(done.stdout) * (1 if sys.platform == "darwin" else 1024)
    assert grown < 24 << 20  # a block of 4 MB, what threads and files take, no tensor of 32 MB
    written, source = tmp_path / "model.safetensors", tmp_path / "source.safetensors"
    assert_same_tensors(load_file(written), load_file(source))


def test_tokenizer_and_generation_config_are_carried_byte_for_byte(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    for number, name in enumerate(CARRIED_FILES):
        (source / name).write_bytes(b"\xff\r\n " + name.encode() * number)
    for name in ("config.json", "model.safetensors", "README.md", "training_args.bin"):
        (source / name).write_bytes(b"not this")
    carry_files(source, target)
    assert sorted(path.name for path in target.iterdir()) == sorted(CARRIED_FILES)
    for name in CARRIED_FILES:
        assert (target / name).read_bytes() == (source / name).read_bytes()


def test_what_the_base_lacks_is_not_carried(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "target").mkdir()
    carry_files(tmp_path / "source", tmp_path / "target")
    assert not list((tmp_path / "target").iterdir())
