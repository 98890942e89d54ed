"""Tiny random models with a tokenizer, made in place, so that no test downloads anything."""

import functools
import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lpdeploy.engines.onnx.exporter import export_onnx
from lpdeploy.families.groups import list_group_specs
from lpdeploy.models.adapters import attach_lora, get_lora_weights
from lpdeploy.models.loading import get_model_classes

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
VOCAB = 64
WORDS = [f"w{index}" for index in range(VOCAB - 3)]

# At this size a second thread does not help; on busy cores its spinning costs ten times the work.
torch.set_num_threads(1)


def make_tokenizer(folder):
    """Save a word-level tokenizer: <unk> 0, <s> 1, </s> 2, then w0, w1, ..."""
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    fast.save_pretrained(folder)
    return fast


def make_tiny_model(folder, *, model_type="llama", heads=4, kv_heads=None, seed=0, **config):
    """Save a random model of two layers, hidden 32, head_dim 8, FFN 48, with its tokenizer.

    Weights are ten times larger than an untrained model's, so that logits are far from zero and
    every head and channel changes them.
    """
    config_class, model_class = get_model_classes(model_type)
    values = {
        "vocab_size": VOCAB + 8,  # as in real models, some rows more than the tokenizer has
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or heads,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,
        **config,
    }
    torch.manual_seed(seed)
    model = model_class(config_class(**values))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # transformers starts biases at zero, which hides bugs
                parameter.normal_(std=0.2)
    folder = Path(folder)
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def make_lora_model(folder, *, rank=4, dropout=0.0, **config):
    """Return a peft model with LoRA on everything and a non-zero lora_b."""
    make_tiny_model(folder, **config)
    _, model_class = get_model_classes(config.get("model_type", "llama"))
    model = model_class.from_pretrained(folder)
    wrapped = attach_lora(model, rank=rank, alpha=2 * rank, dropout=dropout, seed=1)
    fill_lora(model)
    return wrapped


def fill_lora(model):
    """Give every lora_b random values: the zero that peft starts from hides bugs."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for spec in list_group_specs(model.config):
            for piece in spec.slices:
                lora_b = get_lora_weights(model.get_submodule(piece.module)).lora_b
                lora_b.copy_(0.1 * torch.randn(lora_b.shape, generator=generator))


def make_adapter(model_folder, folder, *, rank=4):
    """Save a peft adapter with a non-zero lora_b for the uniform model in ``model_folder``."""
    model_type = json.loads((Path(model_folder) / "config.json").read_text())["model_type"]
    _, model_class = get_model_classes(model_type)
    model = model_class.from_pretrained(model_folder)
    wrapped = attach_lora(model, rank=rank, alpha=2 * rank, dropout=0.0, seed=1)
    fill_lora(model)
    wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    return Path(folder)


def make_text(path, *, documents=40, words=60, seed=0):
    """Save documents of words that follow one another by a rule with noise."""
    generator = torch.Generator().manual_seed(seed)
    lines = []
    for _ in range(documents):
        word = int(torch.randint(len(WORDS), (1,), generator=generator))
        text = []
        for _ in range(words):
            text.append(WORDS[word])
            jump = int(torch.randint(3, (1,), generator=generator))
            word = (3 * word + jump) % len(WORDS)
        lines.append(" ".join(text))
    Path(path).write_text("\n<|endoftext|>\n".join(lines), encoding="utf-8")
    return Path(path)


def set_launcher(monkeypatch):
    """Set the environment as a launcher does for the first of two ranks."""
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)


def list_names(folder):
    """List what is in a folder but records and locks, whose names start with a dot."""
    return sorted(path.name for path in Path(folder).iterdir() if not path.name.startswith("."))


def need_shared():
    """Skip, with a reason, where the real models and data are not beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"no real models and data in {SHARED}")
    return SHARED


# Every shape and precision that an export must carry, in few exports: one takes seconds.
# name -> (model, options of export_onnx)
EXPORTS = {
    # Per-layer widths, grouped heads (three query heads a KV head) and tied embeddings large
    # enough that the exporter does not fold them into a transposed copy.
    "per-layer": (
        {
            "model_type": "lpdeploy_mistral",
            "heads": 12,
            "kv_heads": 4,
            "layer_widths": [[3, 40], [1, 24]],
            "vocab_size": 300,
            "tie_word_embeddings": True,
        },
        {},
    ),
    # Three heads at hidden 32, which only Mistral's config allows, a window shorter than the
    # prompt, and operators of an older set.
    "odd-heads": (
        {"model_type": "mistral", "heads": 3, "sliding_window": 6, "num_hidden_layers": 1},
        {"opset": 18},
    ),
    # Biases, and LoRA beside the weights (``make_export`` adds the adapter).
    "unmerged": ({"model_type": "qwen2", "kv_heads": 2, "num_hidden_layers": 1}, {}),
    # Norms on queries and keys, in half precision.
    "fp16": (
        {"model_type": "qwen3", "kv_heads": 2, "num_hidden_layers": 1},
        {"precision": "fp16"},
    ),
}
_FOLDER = tempfile.TemporaryDirectory(prefix="lpdeploy-tests-")


def make_export(name, *, in_place=False):
    """Export a tiny model once for all tests: (model folder, adapter or None, ONNX folder)."""
    return _export(name, in_place)


@functools.cache
def _export(name, in_place):
    config, options = EXPORTS[name]
    if in_place:  # buffers of 32 positions, and the one opset that has them
        options = {**options, "in_place": True, "opset": None, "max_seq_len": 32}
    root = Path(_FOLDER.name) / (f"{name}-in-place" if in_place else name)
    model = make_tiny_model(root / "model", **config)
    adapter = make_adapter(model, root / "adapter") if name == "unmerged" else None
    export_onnx(model, root / "onnx", adapter=adapter, **options)
    return model, adapter, root / "onnx"


def copy_export(name, folder):
    """Copy an export, to damage it."""
    shutil.copytree(make_export(name)[2], folder)
    return folder


def make_batch(lengths, *, vocab_size, seed=0):
    """Random left-padded rows: (input_ids, attention_mask), both (B, longest)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab_size, (len(lengths), max(lengths)), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : max(lengths) - length] = 0
    return ids, mask


def compute_reference(model, ids, mask):
    """Logits of transformers in one pass without a cache, positions counted by hand."""
    positions = torch.zeros_like(ids)
    for row in range(len(ids)):
        padding = int((mask[row] == 0).sum())
        positions[row, padding:] = torch.arange(ids.shape[1] - padding)
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    return output.logits.float()


def run_with_cache(runner, ids, mask, *, chunks):
    """Logits of a runner that is fed ``chunks`` tokens at a time, at tokens, not at padding."""
    past, start, logits = None, 0, []
    for length in chunks:
        stop = start + length
        output = runner.forward(ids[:, start:stop], attention_mask=mask[:, :stop], past=past)
        assert output.logits.dtype == torch.float32
        logits.append(output.logits)
        past, start = output.past, stop
    assert start == ids.shape[1]
    return torch.cat(logits, dim=1)[mask.bool()]
