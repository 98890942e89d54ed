"""Make the embedded demo: stories, a tokenizer and a small LLaMA model trained on them.

    python -m tools.demo_model.make

It needs no network. Everything it writes comes from the story grammar beside it and from one seed.
"""

from __future__ import annotations

import math
import string
import time
from collections.abc import Container, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from random import Random

import click
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tools.demo_model.story_grammar import generate_story
from tools.measure.common import describe_command

SEPARATOR = "<|endoftext|>"
UNK, BOS, EOS = "<unk>", "<s>", "</s>"
UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
VOCAB_SIZE = 512
SEGMENT = 256
BATCH_SIZE = 8
PEAK_LR = 3e-3
WARMUP_STEPS = 100
TRAIN_CHARS, VALID_CHARS, TOKENIZER_CHARS = 600_000, 50_000, 2_000_000

README = """\
# The embedded demo

A small LLaMA model, its tokenizer and its text. All of it was made by `tools/demo_model/` from the
story grammar there; no text, weights or code of others went in. Licence: Apache-2.0.

| file | what it is |
|---|---|
| `story-llama-1M/` | Hugging Face folder: LlamaForCausalLM, float32, byte-level BPE tokenizer |
| `train.txt` | {train_stories} stories to fine-tune on, a line `{separator}` between two |
| `valid.txt` | {valid_stories} held-out stories in the same form; the model never saw them |

| figure | value |
|---|---|
| parameters | {parameters:,} |
| held-out perplexity | {perplexity:.3f} ({tokens:,} tokens of `valid.txt`) |
| trained on | {seen:,} tokens, generated on the fly, in {minutes:.1f} minutes |
| made | {date}, torch {torch}, transformers {transformers}, {threads} CPU threads |
| command | `{command}` |

Perplexity: each document is put between `<s>` and `</s>`, all are joined and cut in segments of
{segment} tokens (the shorter rest is dropped), and in each segment every token but the first is
predicted. It is low because a grammar leaves little to guess. So short a training teaches the model
the sentences, but not yet to look back: a name or a colour that returns in a story is still a
guess. The text is lower case, and the tokenizer turns a prompt into lower case.
"""


@dataclass(frozen=True)
class Evaluation:
    """What the held-out stories say about the model."""

    perplexity: float
    """exp of the mean negative log-likelihood in nats per predicted token."""
    tokens: int
    """How many tokens were predicted."""


@click.command()
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("lpdeploy/demo/assets"),
    show_default=True,
    help="Folder to write to.",
)
@click.option("--steps", type=click.IntRange(1), default=2000, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(output: Path, steps: int, seed: int) -> None:
    """Write the demo assets: texts, tokenizer, trained model and README."""
    # Two threads: the time in the README was measured so, and more gain little at this size.
    torch.set_num_threads(2)
    train, valid = _write_texts(output, seed=seed)
    tokenizer = build_tokenizer(Random(f"{seed}/tokenizer"))
    tokenizer.save_pretrained(output / "story-llama-1M")
    torch.manual_seed(seed)
    model = build_model()
    start = time.perf_counter()
    batches = iter_batches(tokenizer, Random(f"{seed}/stream"), held_out=frozenset(valid))
    train_model(model, batches, steps=steps)
    seconds = time.perf_counter() - start
    evaluation = compute_perplexity(model, tokenizer, valid)
    click.echo(f"held-out perplexity {evaluation.perplexity:.3f}", err=True)
    model.save_pretrained(output / "story-llama-1M")
    # The weights are written for their owner alone; a packaged file must be readable by all.
    (output / "story-llama-1M" / "model.safetensors").chmod(0o644)
    _write_readme(
        output / "README.md",
        evaluation,
        train_stories=len(train),
        valid_stories=len(valid),
        parameters=model.num_parameters(),
        seen=steps * BATCH_SIZE * SEGMENT,
        minutes=seconds / 60,
    )


def iter_stories(rng: Random) -> Iterator[str]:
    """Yield stories without end."""
    while True:
        yield generate_story(rng)


def take_chars(stories: Iterator[str], chars: int) -> list[str]:
    """Take stories until they hold at least ``chars`` characters."""
    taken: list[str] = []
    while chars > 0:
        taken.append(next(stories))
        chars -= len(taken[-1])
    return taken


def build_tokenizer(rng: Random) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on freshly generated stories.

    Bytes of lower-case printable ASCII and the newline have a token each; others become
    `<unk>`. All 256 bytes would take over a third of the vocabulary for text that has none.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    # Stories are lower case; so a prompt that is not still reads as one of them.
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # The byte-level alphabet writes a space as U+0120 and a newline as U+010A.
    printable = string.ascii_lowercase + string.digits + string.punctuation
    trainer = BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[UNK, BOS, EOS],
        initial_alphabet=[*printable, "\u0120", "\u010a"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(take_chars(iter_stories(rng), TOKENIZER_CHARS), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=UNK,
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def build_model() -> LlamaForCausalLM:
    """Build the model with random weights from torch's current seed."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=UNK_ID,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=UNK_ID
    )
    return model


def iter_segments(
    tokenizer: PreTrainedTokenizerFast, stories: Iterator[str], *, skip: Container[str] = ()
) -> Iterator[Tensor]:
    """Join stories as `<s> story </s>` and cut the stream in full segments, shape (SEGMENT,)."""
    stream: list[int] = []
    for story in stories:
        if story in skip:
            continue
        stream += [*tokenizer(story)["input_ids"], EOS_ID]
        while len(stream) >= SEGMENT:
            yield torch.tensor(stream[:SEGMENT])
            del stream[:SEGMENT]


def iter_batches(
    tokenizer: PreTrainedTokenizerFast, rng: Random, *, held_out: Container[str]
) -> Iterator[Tensor]:
    """Yield batches of new text without end, shape (BATCH_SIZE, SEGMENT), int64."""
    segments = iter_segments(tokenizer, iter_stories(rng), skip=held_out)
    while True:
        yield torch.stack(list(islice(segments, BATCH_SIZE)))


def compute_learning_rate(step: int, steps: int) -> float:
    """Rise linearly to the peak, then fall to zero along a cosine."""
    warmup = min(WARMUP_STEPS, steps // 10 + 1)
    if step < warmup:
        return PEAK_LR * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return PEAK_LR * 0.5 * (1 + math.cos(math.pi * progress))


def train_model(model: LlamaForCausalLM, batches: Iterator[Tensor], *, steps: int) -> None:
    """Train ``model`` in place with AdamW and report to stderr every 50 steps."""
    optimizer = _build_optimizer(model)
    model.train()
    start = time.perf_counter()
    for step, batch in enumerate(islice(batches, steps)):
        for group in optimizer.param_groups:
            group["lr"] = compute_learning_rate(step, steps)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step + 1 == steps:
            seconds = time.perf_counter() - start
            click.echo(f"step {step}/{steps} loss {loss.item():.4f} {seconds:.0f} s", err=True)
    model.eval()


def _build_optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """Build AdamW with weight decay on matrices, none on the gains of the norms."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    gains = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.98), fused=True)


@torch.inference_mode()
def compute_perplexity(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, stories: list[str]
) -> Evaluation:
    """Measure perplexity on joined stories, cut in full segments."""
    segments = list(iter_segments(tokenizer, iter(stories)))
    # Every segment predicts as many tokens, so the mean over segments is the mean over tokens.
    losses = [model(input_ids=s[None], labels=s[None]).loss.double() for s in segments]
    mean = torch.stack(losses).mean().item()
    return Evaluation(perplexity=math.exp(mean), tokens=len(segments) * (SEGMENT - 1))


def _write_texts(output: Path, *, seed: int) -> tuple[list[str], list[str]]:
    """Write train.txt and valid.txt; no story is in both."""
    output.mkdir(parents=True, exist_ok=True)
    train = take_chars(iter_stories(Random(f"{seed}/train")), TRAIN_CHARS)
    known = set(train)
    fresh = (s for s in iter_stories(Random(f"{seed}/valid")) if s not in known)
    valid = take_chars(fresh, VALID_CHARS)
    for name, stories in (("train.txt", train), ("valid.txt", valid)):
        text = f"\n{SEPARATOR}\n".join(stories) + "\n"
        (output / name).write_text(text, encoding="utf-8")
    return train, valid


def _write_readme(path: Path, evaluation: Evaluation, **figures: float) -> None:
    """Write the README with what this run measured."""
    text = README.format(
        perplexity=evaluation.perplexity,
        tokens=evaluation.tokens,
        date=datetime.now(tz=UTC).date().isoformat(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        threads=torch.get_num_threads(),
        command=describe_command(),
        separator=SEPARATOR,
        segment=SEGMENT,
        **figures,
    )
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
