"""Make the embedded demo: stories, a tokenizer and a small LLaMA model trained on them.

    python -m tools.demo_model.make

It needs no network. Everything that it writes comes from the story grammar and one seed.
"""

import math
import string
import time
from collections.abc import Container, Iterator
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from random import Random

import click
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lpdeploy.evaluation.evaluate import evaluate
from lpdeploy.evaluation.options import EvalOptions
from lpdeploy.evaluation.results import Perplexity
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
ROUNDING = 0.1  # of the standard deviation of a matrix; the perplexity changes in the fifth digit
TRAIN_CHARS, VALID_CHARS, TOKENIZER_CHARS = 600_000, 50_000, 2_000_000

README = """\
# The embedded demo

A small LLaMA model, its tokenizer and its text. `tools/demo_model/` made all of it from the story
grammar there, without text, weights or code of others. Licence: Apache-2.0.

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

The perplexity is that of `lpdeploy eval --seq-len {segment}`. It is low because a grammar leaves
little to guess. The training is short: the model knows the sentences, but does not look back, so
it still guesses a name or a colour that returns in a story. The text is lower case, and the
tokenizer turns a prompt into lower case.

The weights were rounded after the training, each matrix to multiples of about a tenth of its
spread, so that they pack into a small wheel. The perplexity is that of the rounded weights.
"""


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
    torch.set_num_threads(2)  # as for the time in the README; more gain little at this size
    folder = output / "story-llama-1M"
    train, valid = _write_texts(output, seed=seed)
    tokenizer = build_tokenizer(Random(f"{seed}/tokenizer"))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    model = build_model()
    start = time.perf_counter()
    batches = iter_batches(tokenizer, Random(f"{seed}/stream"), held_out=frozenset(valid))
    train_model(model, batches, steps=steps)
    seconds = time.perf_counter() - start
    apply_rounding(model)
    model.save_pretrained(folder)
    # The weights are written for their owner alone; a packaged file must be readable by all.
    (folder / "model.safetensors").chmod(0o644)
    measured = compute_perplexity(folder, output / "valid.txt")
    click.echo(f"held-out perplexity {measured.perplexity:.3f}", err=True)
    _write_readme(
        output / "README.md",
        measured,
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
    """Train a byte-level BPE tokenizer on newly generated stories.

    Lower-case printable ASCII and the newline have one token per byte; other bytes become `<unk>`.
    Tokens for all 256 would spend over a third of the vocabulary on bytes that the stories lack.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    # Stories are lower case, so a prompt with capitals must become so as well.
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
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
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


def iter_batches(
    tokenizer: PreTrainedTokenizerFast, rng: Random, *, held_out: Container[str]
) -> Iterator[Tensor]:
    """Yield batches of joined stories, `<s> story </s>`, shape (BATCH_SIZE, SEGMENT), int64."""
    stream: list[int] = []
    size = BATCH_SIZE * SEGMENT
    for story in iter_stories(rng):
        if story not in held_out:
            stream += [*tokenizer(story)["input_ids"], EOS_ID]
        if len(stream) >= size:
            yield torch.tensor(stream[:size]).view(BATCH_SIZE, SEGMENT)
            del stream[:size]


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


def apply_rounding(model: nn.Module) -> None:
    """Round each matrix to whole multiples of a power of two, near a tenth of its spread.

    The weights stay float32, but most of their bits are zero: a wheel packs them in a third of the
    bytes that it would otherwise need.
    """
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                step = 2.0 ** round(math.log2(ROUNDING * weight.std().item()))
                weight.copy_(torch.round(weight / step) * step)


def compute_perplexity(folder: Path, text: Path) -> Perplexity:
    """Measure the saved model on the held-out stories."""
    options = EvalOptions(perplexity=(str(text),), seq_len=SEGMENT)
    return evaluate(folder, options, device="cpu").figures.perplexity[str(text)]


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


def _write_readme(path: Path, measured: Perplexity, **figures: float) -> None:
    """Write the README with the figures of this run."""
    text = README.format(
        perplexity=measured.perplexity,
        tokens=measured.tokens,
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
