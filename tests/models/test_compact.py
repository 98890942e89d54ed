"""The compact stage: what it writes computes what the masked base with its adapter computes."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lpdeploy.artifacts import compute_sha256
from lpdeploy.config import PruneConfig
from lpdeploy.families.groups import list_group_specs
from lpdeploy.manifest import load_stage
from lpdeploy.models.compact import compact
from lpdeploy.models.loading import compute_model_sha256, load_config, load_model, load_tokenizer
from lpdeploy.models.record import load_model_record
from lpdeploy.pruning.run import prune
from lpdeploy.run_folder import RunFolder
from tests.helpers import make_text, need_shared
from tests.models.families import (
    FAMILIES,
    TOKENS,
    build_reference,
    choose_kept,
    compute_logits,
    decode,
    keep_all,
    list_positions,
    make_base,
    make_plan,
    make_run,
)

# float32 adds the terms that stay, and LoRA's, in another order: a few 2**-24 of logits up to 5
# over two layers. A wrong row or column changes logits by more than 0.1.
CLOSE = {"rtol": 0, "atol": 1e-5}


def load_stock(folder):
    """Load as a user does: no class of ours, no code of the checkpoint's, nothing made up."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(model).__module__.startswith("transformers.")
    return model


# No stock class has biases and 6 heads over 32: that case is among the per-layer ones.
UNIFORM = [(f, heads) for f in FAMILIES for heads in (2, 3) if (f, heads) != ("llama-bias", 3)]


@pytest.mark.parametrize(("family", "heads"), UNIFORM)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_uniform_model_is_a_stock_checkpoint_of_the_same_function(
    bases, family, heads, dtype, tmp_path
):
    base = bases(family, dtype)
    kept = choose_kept(base, heads=heads, channels=20)
    run = make_run(tmp_path / "run", base, kept)
    result = compact(run)
    model = load_stock(run / "model")
    divides = 32 % model.config.num_attention_heads == 0
    stays = not family.startswith("llama") or divides
    expected = load_config(base).architectures[0] if stays else "MistralForCausalLM"
    assert (
        type(model).__name__
        == expected
        == result.record.architecture
        == model.config.architectures[0]
    )
    if not stays:
        assert model.config.sliding_window is None
    stored = load_file(run / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert load_config(run / "model").dtype == dtype
    # Of a bf16 base both sides hold weights merged in float32 and rounded once, and compute in
    # float32 here; that a merged weight falls on the other side of a tie would show as 1e-3.
    expected = compute_logits(build_reference(base, kept, run / "adapter"))
    torch.testing.assert_close(compute_logits(model), expected, **CLOSE)
    torch.testing.assert_close(decode(model), expected, **CLOSE)


def test_pruned_by_prune_compacts_to_the_masked_base(bases, tmp_path):
    """The whole line once, with what `prune` itself writes."""
    base = bases("llama-gqa")
    options = PruneConfig(
        ratio=0.25, steps=2, batch_size=2, micro_batch_size=2, seq_len=16, prune_every=1,
        round_to=4, lr=1e-2, prune_warmup=0.0, prune_cooldown=0.0, device="cpu",
    )  # fmt: skip
    text = make_text(tmp_path / "text.txt")
    prune(str(base), tmp_path / "run", data=str(text), options=options)
    compact(tmp_path / "run")
    kept = RunFolder(tmp_path / "run").load_plan().kept
    assert {len(kept["layers.0.heads"]), len(kept["layers.1.heads"])} == {3}
    expected = compute_logits(build_reference(base, kept, tmp_path / "run" / "adapter"))
    model = load_stock(tmp_path / "run" / "model")
    torch.testing.assert_close(compute_logits(model), expected, **CLOSE)
    assert (expected - compute_logits(build_reference(base, kept))).abs().max() > 0.01
    compact(tmp_path / "run", keep_adapter=True)
    folder = tmp_path / "run" / "unmerged"
    unmerged = PeftModel.from_pretrained(load_stock(folder), str(folder / "adapter")).eval()
    torch.testing.assert_close(compute_logits(unmerged), expected, **CLOSE)


def test_scaled_rotary_positions_are_carried(tmp_path):
    rope = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8,
    }  # fmt: skip
    base = make_base(tmp_path / "base", "llama-gqa", rope_parameters=rope, rms_norm_eps=1e-2)
    kept = choose_kept(base, heads=3, channels=20)
    run = make_run(tmp_path / "run", base, kept)
    assert compact(run).record.architecture == "MistralForCausalLM"
    expected = compute_logits(build_reference(base, kept, run / "adapter"))
    torch.testing.assert_close(compute_logits(load_stock(run / "model")), expected, **CLOSE)


PER_LAYER = {
    "llama-mha": ([3, 2], [20, 31]),
    "llama-gqa": ([1, 4], [20, 48]),
    "llama-bias": (3, 20),  # uniform, but no stock class fits
    "llama-tied": ([3, 2], [20, 31]),
    "mistral": ([3, 2], [20, 31]),
    "qwen2": ([3, 2], [20, 31]),
    "qwen3": ([3, 2], [20, 31]),
}

# Runs a model card's own snippet where lpdeploy cannot be imported.
RUN_CARD = """
import re, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lpdeploy":
            raise ImportError("lpdeploy is not here")
sys.meta_path.insert(0, Block())
import torch
from pathlib import Path
from safetensors.torch import load_file, save_file
tokens = load_file(sys.argv[1])["tokens"]
for folder in sys.argv[2:]:
    snippet = re.search("```python\\n(.*?)```", Path(folder, "README.md").read_text(), re.S)[1]
    scope = {}
    exec(snippet, scope)
    model = scope["model"].eval()
    with torch.no_grad():
        logits = model(tokens).logits
    new = model.generate(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=6,
        min_new_tokens=6, do_sample=False, pad_token_id=0)
    words = torch.tensor(scope["tokenizer"]("w0 w1")["input_ids"])
    save_file({"logits": logits, "new": new, "words": words}, folder + ".out")
assert "lpdeploy" not in sys.modules
"""


@pytest.mark.slow
def test_per_layer_models_load_where_lpdeploy_is_not(bases, tmp_path):
    """One process for all families: the card's snippet, logits, cached generation, tokenizer."""
    folders = {}
    for family, (heads, channels) in PER_LAYER.items():
        kept = choose_kept(bases(family), heads=heads, channels=channels)
        run = make_run(tmp_path / family, bases(family), kept)
        assert compact(run).record.architecture.startswith("PerLayer")
        folders[run / "model"] = (family, kept, run)
    compact(run, keep_adapter=True)
    folders[run / "unmerged"] = (family, kept, run)
    save_file({"tokens": TOKENS}, tmp_path / "tokens")
    done = subprocess.run(
        [sys.executable, "-c", RUN_CARD, str(tmp_path / "tokens"), *map(str, folders)],
        cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300,
        check=False,
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Do you wish to run the custom code" not in done.stdout + done.stderr
    for folder, (family, kept, run) in folders.items():
        out = load_file(f"{folder}.out")
        reference = build_reference(bases(family), kept, run / "adapter")
        torch.testing.assert_close(out["logits"], compute_logits(reference), **CLOSE)
        new = reference.generate(
            input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS), max_new_tokens=6,
            min_new_tokens=6, do_sample=False, pad_token_id=0,
        )  # fmt: skip
        assert out["new"].tolist() == new.tolist()
        if not family.startswith("qwen"):  # transformers makes a Qwen tokenizer of its own
            assert out["words"].tolist() == [3, 4]


@pytest.mark.parametrize("family", ["llama-gqa", "qwen3"])
def test_per_layer_models_load_through_lpdeploy(bases, family, tmp_path, capsys):
    kept = choose_kept(bases(family), heads=[3, 2], channels=[20, 31])
    run = make_run(tmp_path / "run", bases(family), kept)
    compact(run)
    model = load_model(run / "model")
    expected = compute_logits(build_reference(bases(family), kept, run / "adapter"))
    torch.testing.assert_close(compute_logits(model), expected, **CLOSE)
    assert load_tokenizer(run / "model", model.config) is not None
    assert "custom code" not in capsys.readouterr().out  # transformers would ask on the terminal


@pytest.mark.parametrize("family", ["llama-gqa", "llama-tied", "qwen2", "qwen3"])
def test_a_kept_adapter_computes_what_the_merged_model_computes(bases, family, tmp_path):
    kept = choose_kept(bases(family), heads=2, channels=20)
    run = make_run(tmp_path / "run", bases(family), kept)
    compact(run)
    result = compact(run, keep_adapter=True)
    folder = run / "unmerged"
    assert result.model == folder
    unmerged = PeftModel.from_pretrained(load_stock(folder), str(folder / "adapter"))
    expected = compute_logits(load_stock(run / "model"))
    torch.testing.assert_close(compute_logits(unmerged.eval()), expected, **CLOSE)
    plain = compute_logits(build_reference(bases(family), kept))
    torch.testing.assert_close(compute_logits(load_stock(folder)), plain, **CLOSE)
    assert (plain - expected).abs().max() > 0.1
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder)
    weights = "adapter_model.safetensors"
    assert (folder / "adapter" / weights).read_bytes() == (run / "adapter" / weights).read_bytes()
    assert load_model_record(folder).merged is False
    assert load_model_record(run / "model").merged is True


@pytest.mark.parametrize("family", ["llama-tied", "qwen2"])
def test_shards_are_the_same_model(bases, family, tmp_path):
    kept = choose_kept(bases(family), heads=3, channels=20)
    run = make_run(tmp_path / "run", bases(family), kept)
    whole = compact(run)
    result = compact(run, output=tmp_path / "shards", max_shard_bytes=5000)
    files = list((tmp_path / "shards").glob("model-*.safetensors"))
    assert len(files) > 3
    assert not (tmp_path / "shards" / "model.safetensors").exists()
    expected = load_file(run / "model" / "model.safetensors")
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
    assert result.record.parameters == whole.record.parameters
    model = load_stock(tmp_path / "shards")
    assert torch.equal(compute_logits(model), compute_logits(load_stock(run / "model")))


def test_keeping_all_gives_the_base_back(bases, tmp_path):
    run = make_run(tmp_path / "run", bases("llama-mha"), keep_all(bases("llama-mha")))
    result = compact(run, keep_adapter=True)
    written = (run / "unmerged" / "model.safetensors").read_bytes()
    assert written == (bases("llama-mha") / "model.safetensors").read_bytes()
    assert result.record.parameters["before"] == result.record.parameters["after"]
    assert result.record.bytes["before"] == result.record.bytes["after"] == len(written)


def permute_groups(base, folder, orders):
    """Save ``base`` with the groups of each layer in another order: the same function."""
    shutil.copytree(base, folder)
    tensors = load_file(base / "model.safetensors")
    for spec in list_group_specs(load_config(base)):
        for piece in spec.slices:
            positions = torch.tensor(list_positions(orders[spec.name], piece.block))
            for name in (f"{piece.module}.weight", f"{piece.module}.bias"):
                if name in tensors and not (name.endswith("bias") and piece.dim == 1):
                    tensors[name] = tensors[name].index_select(piece.dim, positions)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("family", ["llama-mha", "llama-gqa", "llama-bias", "qwen3"])
def test_the_order_of_the_groups_does_not_matter(bases, family, tmp_path):
    """Permute KV heads (with their query heads) and channels, and the plan alike."""
    base = bases(family)
    generator = torch.Generator().manual_seed(5)
    specs = list_group_specs(load_config(base))
    orders = {s.name: torch.randperm(s.num_groups, generator=generator).tolist() for s in specs}
    permuted = permute_groups(base, tmp_path / "permuted", orders)
    kept = choose_kept(base, heads=2, channels=20)
    moved = {
        name: [place for place, group in enumerate(orders[name]) if group in kept[name]]
        for name in orders
    }
    compact(make_run(tmp_path / "a", base, kept), keep_adapter=True)
    compact(make_run(tmp_path / "b", permuted, moved), keep_adapter=True)
    first = compute_logits(load_stock(tmp_path / "a" / "unmerged"))
    second = compute_logits(load_stock(tmp_path / "b" / "unmerged"))
    torch.testing.assert_close(first, second, **CLOSE)  # o_proj sums its heads in another order
    wrong = make_run(tmp_path / "c", permuted, kept)  # and the plan does matter
    compact(wrong, keep_adapter=True)
    assert (compute_logits(load_stock(wrong / "unmerged")) - first).abs().max() > 0.1


def test_a_compacted_model_can_be_pruned_and_compacted_again(bases, tmp_path):
    first = make_run(
        tmp_path / "a", bases("llama-gqa"), choose_kept(bases("llama-gqa"), heads=3, channels=20)
    )
    compact(first)
    kept = choose_kept(first / "model", heads=1, channels=9)
    second = make_run(tmp_path / "b", first / "model", kept)
    assert compact(second).record.architecture == "MistralForCausalLM"
    expected = compute_logits(build_reference(first / "model", kept, second / "adapter"))
    torch.testing.assert_close(compute_logits(load_stock(second / "model")), expected, **CLOSE)


@pytest.fixture
def base(tmp_path):
    return make_base(tmp_path / "base", "llama-gqa")


@pytest.fixture
def run(base, tmp_path):
    return make_run(tmp_path / "run", base, choose_kept(base, heads=3, channels=20))


def test_a_stored_copy_of_a_tied_head_is_counted_once(tmp_path):
    """As older checkpoints have it; transformers ties the two when they are equal."""
    base = make_base(tmp_path / "base", "llama-tied")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    kept = choose_kept(base, heads=2, channels=20)
    run = make_run(tmp_path / "run", base, kept)
    result = compact(run)
    model = load_stock(run / "model")
    assert result.record.parameters["after"] == sum(p.numel() for p in model.parameters())
    expected = compute_logits(build_reference(base, kept, run / "adapter"))
    torch.testing.assert_close(compute_logits(model), expected, **CLOSE)


def test_tokenizer_and_generation_config_are_carried(base, run):
    (base / "chat_template.jinja").write_bytes(b"{{ messages }}\r\n")
    generation = (base / "generation_config.json").read_bytes() + b"\n  "
    (base / "generation_config.json").write_bytes(generation)
    compact(run)
    carried = ("tokenizer.json", "tokenizer_config.json", "generation_config.json",
               "chat_template.jinja")  # fmt: skip
    for name in carried:
        assert (run / "model" / name).read_bytes() == (base / name).read_bytes()


def test_the_result_states_what_was_written(base, run):
    result = compact(run)
    model = load_stock(run / "model")
    assert result.record.parameters == {
        "before": sum(p.numel() for p in load_model(base).parameters()),
        "after": sum(p.numel() for p in model.parameters()),
    }
    assert result.record.bytes == {
        "before": (base / "model.safetensors").stat().st_size,
        "after": (run / "model" / "model.safetensors").stat().st_size,
    }
    record = result.record
    assert (record.heads, record.kv_heads, record.channels) == ([6, 6], [3, 3], [20, 20])
    assert result.seconds > 0
    assert result.peak_bytes > 0


def test_the_record_says_where_a_model_is_from(base, run):
    result = compact(run)
    record = load_model_record(run / "model")
    plan = RunFolder(run).load_plan()
    assert record.to_json() == {
        "schema_version": 1,
        "base_model": str(base),
        "base_sha256": compute_model_sha256(base),
        "plan_sha256": compute_sha256(run / "plan.json"),
        "ratio": 0.5,
        "achieved": dict(plan.achieved),
        "merged": True,
        "architecture": "MistralForCausalLM",
        "parameters": dict(result.record.parameters),
        "bytes": dict(result.record.bytes),
        "heads": [6, 6],
        "kv_heads": [3, 3],
        "channels": [20, 20],
        "sha256": compute_model_sha256(run / "model"),
    }
    assert load_model_record(base) is None
    stage = load_stage(run, "compact")
    assert stage.inputs == {
        "base": plan.base_sha256, "adapter": compute_sha256(run / "adapter"),
    }  # fmt: skip
    assert stage.outputs == {"model": record.sha256}
    assert stage.options == {"output": str(run / "model"), "max_shard_bytes": 1 << 30}


def test_both_ways_are_recorded(run):
    compact(run)
    compact(run, keep_adapter=True)
    assert load_stage(run, "compact").outputs.keys() == {"model"}
    assert load_stage(run, "compact --keep-adapter").outputs.keys() == {"unmerged"}


def test_nothing_but_the_model_is_written(run):
    compact(run)
    assert {path.name for path in (run / "model").iterdir()} == {
        ".lpdeploy.json", "README.md", "config.json", "generation_config.json", "lpdeploy.json",
        "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert {path.name for path in run.iterdir()} == {
        ".lock", "adapter", "manifest.json", "model", "plan.json",
    }  # fmt: skip


@pytest.mark.real
def test_a_real_model_compacts_to_the_masked_base(tmp_path):
    base = need_shared() / "models" / "stories260K"
    kept = choose_kept(base, heads=3, channels=120)
    run = make_run(tmp_path / "run", base, kept)
    assert compact(run).record.architecture == "MistralForCausalLM"  # 64 does not divide by 6 heads
    expected = compute_logits(build_reference(base, kept, run / "adapter"))
    # As CLOSE, over five layers and logits up to about 20.
    torch.testing.assert_close(
        compute_logits(load_stock(run / "model")), expected, rtol=0, atol=1e-4
    )
    tokenizer = load_tokenizer(run / "model", load_config(run / "model"))
    words = "Once upon a time, there was a little girl."
    assert tokenizer(words) == load_tokenizer(base, load_config(base))(words)
    assert make_plan(base, kept).base_sha256 == load_model_record(run / "model").base_sha256
    assert re.fullmatch("[0-9a-f]{64}", load_model_record(run / "model").sha256)
