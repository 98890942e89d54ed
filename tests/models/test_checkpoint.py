"""Streaming a base into a pruned checkpoint: its tensors, its shards, its memory, its errors."""

import json
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lpdeploy.errors import ArtifactError
from lpdeploy.models import checkpoint
from lpdeploy.models.adapters import LoraWeights, load_adapter
from lpdeploy.models.checkpoint import (
    CARRIED_FILES,
    carry_files,
    save_shards,
    stream_pruned_tensors,
)
from lpdeploy.models.loading import load_model
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


@every_family
@both_dtypes
def test_a_ratio_of_zero_gives_the_tensors_of_the_base(bases, family, dtype):
    base = bases(family, dtype)
    streamed = dict(stream_pruned_tensors(base, make_plan(base, keep_all(base)), {}))
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
    streamed = dict(stream_pruned_tensors(base, plan, {}))
    expected = load_file(base / "model.safetensors")
    for spec in plan.specs:
        for piece in spec.slices:
            positions = list_positions(kept[spec.name], piece.block)
            for leaf in ("weight", "bias"):
                name = f"{piece.module}.{leaf}"
                if name in expected and not (leaf == "bias" and piece.dim == 1):
                    rows = expected[name].unbind(piece.dim)
                    expected[name] = torch.stack([rows[p] for p in positions], dim=piece.dim)
    assert_same_tensors(streamed, expected)


@every_family
@both_dtypes
def test_lora_is_merged_in_float32_and_rounded_once(bases, family, dtype, tmp_path):
    base = bases(family, dtype)
    kept = choose_kept(base, heads=[3, 2], channels=[20, 31])
    run = make_run(tmp_path / "run", base, kept)
    plan = make_plan(base, kept)
    cut = dict(stream_pruned_tensors(base, plan, {}))
    merged = dict(stream_pruned_tensors(base, plan, load_adapter(run / "adapter")))
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
    expected = dict(stream_pruned_tensors(bases("llama-bias"), plan, {}))
    assert_same_tensors(dict(stream_pruned_tensors(tmp_path, plan, {})), expected)


def test_the_tables_of_old_checkpoints_are_dropped(tmp_path):
    base = make_base(tmp_path / "base", "llama-mha")
    expected = load_file(base / "model.safetensors")
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file({**expected, **table}, base / "model.safetensors", metadata={"format": "pt"})
    streamed = dict(stream_pruned_tensors(base, make_plan(base, keep_all(base)), {}))
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
        dict(stream_pruned_tensors(base, plan, {}))


@pytest.mark.parametrize("size", [4, -100])  # within the header, within the last tensor
def test_a_truncated_file_is_refused(tmp_path, size):
    base = make_base(tmp_path / "base", "llama-mha")
    plan = make_plan(base, keep_all(base))
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ArtifactError, match=r"cannot be read: .* Copy the base model anew"):
        dict(stream_pruned_tensors(base, plan, {}))


def test_a_shard_that_is_not_there_is_refused(bases, tmp_path):
    load_model(bases("llama-mha")).save_pretrained(tmp_path, max_shard_size="20KB")
    plan = make_plan(tmp_path, keep_all(tmp_path))
    min(tmp_path.glob("model-*.safetensors")).unlink()
    with pytest.raises(ArtifactError, match=r"cannot be read: .* Copy the base model anew"):
        dict(stream_pruned_tensors(tmp_path, plan, {}))


@pytest.mark.parametrize("shapes", [((4, 31), (48, 4)), ((4, 32), (47, 4))])
def test_factors_of_other_shapes_are_refused(bases, shapes):
    base = bases("llama-mha")
    lora_a, lora_b = (torch.zeros(shape) for shape in shapes)
    lora = {"model.layers.1.mlp.up_proj": LoraWeights(lora_a, lora_b, 1.0)}
    with pytest.raises(ArtifactError, match=r"up_proj.weight has shape .* are of different runs"):
        dict(stream_pruned_tensors(base, make_plan(base, keep_all(base)), lora))


def make_tensors(count, *, rows=100):
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        yield f"tensor{number}", torch.randn(rows, generator=generator)


def test_one_shard_needs_no_index(tmp_path):
    save_shards(tmp_path, make_tensors(5), max_shard_bytes=2000)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert_same_tensors(load_file(tmp_path / "model.safetensors"), dict(make_tensors(5)))
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses a file without


def test_shards_are_bounded_and_listed(tmp_path):
    save_shards(tmp_path, make_tensors(5), max_shard_bytes=800)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 400
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    read = {}
    for file in files:
        tensors = load_file(tmp_path / file)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 800
        assert all(index["weight_map"][name] == file for name in tensors)
        read |= tensors
    assert_same_tensors(read, dict(make_tensors(5)))
    assert len(list(tmp_path.iterdir())) == 4


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path):
    save_shards(tmp_path, make_tensors(3), max_shard_bytes=1)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_a_shard_is_written_before_more_than_one_further_tensor_is_read(tmp_path):
    written = []

    def watch():
        for number, (name, tensor) in enumerate(make_tensors(6)):
            written.append(len(list(tmp_path.glob("shard-*"))))
            assert written[-1] >= (number - 1) // 2  # two tensors a shard
            yield name, tensor

    save_shards(tmp_path, watch(), max_shard_bytes=800)
    assert written == [0, 0, 0, 1, 1, 2]


class Meter:
    """Bytes of the tensors that passed by and are alive still, and their peak."""

    def __init__(self):
        self.alive = self.peak = self.largest = 0

    def watch(self, tensors):
        for name, tensor in tensors:
            self.alive += tensor.nbytes
            self.peak = max(self.peak, self.alive)
            self.largest = max(self.largest, tensor.nbytes)
            weakref.finalize(tensor, self._drop, tensor.nbytes)
            yield name, tensor
            del tensor

    def _drop(self, size):
        self.alive -= size


def test_memory_is_a_shard_and_not_a_model(bases, tmp_path, monkeypatch):
    """Of the base a tensor at a time is in memory, of the result a shard and its next tensor."""
    base = bases("llama-gqa")
    kept = choose_kept(base, heads=[3, 2], channels=[20, 31])
    lora = load_adapter(make_run(tmp_path / "run", base, kept) / "adapter")
    read, written, stream_file = Meter(), Meter(), checkpoint._stream_file
    monkeypatch.setattr(checkpoint, "_stream_file", lambda file: read.watch(stream_file(file)))
    tensors = stream_pruned_tensors(base, make_plan(base, kept), lora)
    folder = tmp_path / "model"
    folder.mkdir()
    save_shards(folder, written.watch(tensors), max_shard_bytes=12_000)
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert total > 5 * 12_000
    assert written.peak <= 12_000 + written.largest
    # A tensor that is neither cut nor merged is passed on and lives until its shard is written.
    assert read.peak <= 12_000 + 2 * read.largest
    assert read.alive == written.alive == 0


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
