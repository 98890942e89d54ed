"""Small models with a tokenizer that every server has, and what transformers makes of them."""

import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import lpdeploy
from lpdeploy.models.compact import compact
from tests.models.families import choose_kept, make_base, make_run

DEMO = Path(lpdeploy.__file__).parent / "demo" / "assets" / "story-llama-1M"
PROMPT = "once upon a time"
TOKENS = 32
ROWS = 520  # the demo's tokenizer has 512, and as in real models the embedding some rows more


def make_demo_run(folder, *, heads=5, channels=96):
    """Compact a run of the demo's model.

    Five heads of 16 are not the hidden size of 128, and do not divide it.
    """
    kept = choose_kept(DEMO, heads=heads, channels=channels)
    run = make_run(folder, DEMO, kept)
    compact(run)
    return run


def make_family(folder, family, **config):
    """Save a tiny random model of a family with the demo's byte-level BPE."""
    folder = make_base(folder, family, vocab_size=ROWS, **config)
    copy_demo_tokenizer(folder)
    return folder


def copy_demo_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / name, folder / name)


@torch.no_grad()
def generate(folder, ids, *, tokens=TOKENS):
    """The tokens after ``ids`` that are likeliest by transformers, each in its turn, in fp32.

    Nothing stops it, not even a token that ends a text, and it has no cache.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = list(ids)
    for _ in range(tokens):
        text.append(int(model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
    return text[len(ids) :]
