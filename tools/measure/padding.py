r"""Measure what sorting the rows of a step by length, and keeping tokens on disk, are worth.

    python tools/measure_data.py MODEL --pairs alpaca.json --text train.txt \
        --output docs/measurements/data-cpu.json

Padding: instruction pairs in the order in which they are drawn and sorted by length: the share of
padding over a pass, for several sizes; and in turns the processor's time of forward and backward
of a step, and how far the gradients of the two are apart. Cache: the time to tokenise a text, to
hash it (what finding its tokens costs), and to find, check and map them.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lpdeploy.artifacts import describe_machine, save_json
from lpdeploy.data.batches import TokenDataset, build_token_dataset, list_batch, split_batch
from lpdeploy.data.cache import load_or_build
from lpdeploy.data.sources import compute_source_sha256, load_corpus
from lpdeploy.families.groups import list_group_specs
from lpdeploy.models.adapters import attach_lora, get_lora_weights
from lpdeploy.models.loading import load_config, load_model, load_tokenizer

SIZES = ((32, 4), (128, 4), (128, 16))  # rows of a step, of a micro-batch


def split_unsorted(rows: Sequence[int], size: int) -> list[list[int]]:
    """Deal rows into micro-batches as they come."""
    return [list(rows[i : i + size]) for i in range(0, len(rows), size)]


def run_step(model: Any, dataset: TokenDataset, micros: list[list[int]]) -> tuple[float, Tensor]:
    """Run forward and backward over a step.

    Returns:
        Seconds of the processor, which other work on the machine does not disturb as it disturbs
        the clock's, and the gradient, as one vector.
    """
    model.zero_grad()
    start = time.process_time()
    batches = [dataset.collate(micro) for micro in micros]
    targets = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    for batch in batches:
        output = model(
            input_ids=batch["input_ids"],
            labels=batch["labels"],
            num_items_in_batch=torch.tensor(targets),
            use_cache=False,
        )
        output.loss.backward()
    seconds = time.process_time() - start
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return seconds, torch.cat(grads).double()


def compute_share(micros: list[list[int]], dataset: TokenDataset) -> tuple[int, int]:
    """Return tokens, and tokens with padding."""
    used = sum(int(dataset.lengths[micro].sum()) for micro in micros)
    return used, sum(len(micro) * int(dataset.lengths[micro].max()) for micro in micros)


def list_orders(dataset: TokenDataset, micro_batch_size: int) -> dict[str, Any]:
    """Return both ways to deal the rows of a step into micro-batches."""
    return {
        "as drawn": lambda rows: split_unsorted(rows, micro_batch_size),
        "sorted": lambda rows: split_batch(
            rows, dataset.lengths, micro_batch_size=micro_batch_size
        ),
    }


def compute_padding(
    dataset: TokenDataset, *, batch_size: int, micro_batch_size: int
) -> dict[str, Any]:
    """Compute the share of padding of both orders over one pass."""
    padding = {}
    for name, split in list_orders(dataset, micro_batch_size).items():
        steps = range(len(dataset) // batch_size)
        batches = [list_batch(len(dataset), step=s, batch_size=batch_size, seed=0) for s in steps]
        counts = [compute_share(split(rows), dataset) for rows in batches]
        padding[name] = 1 - sum(used for used, _ in counts) / sum(all_ for _, all_ in counts)
    return {"batch_size": batch_size, "micro_batch_size": micro_batch_size, **padding}


def measure_steps(
    model: Any, dataset: TokenDataset, *, batch_size: int, micro_batch_size: int, steps: int
) -> dict[str, Any]:
    """Time both orders in turns, after one step that warms up."""
    orders = list_orders(dataset, micro_batch_size)
    seconds: dict[str, list[float]] = {name: [] for name in orders}
    apart = 0.0
    for step in range(steps + 1):
        rows = list_batch(len(dataset), step=step, batch_size=batch_size, seed=0)
        grads = {}
        for name, split in orders.items():
            micros = split(rows)
            taken, grads[name] = run_step(model, dataset, micros)
            if step:
                seconds[name].append(taken)
        difference = (grads["sorted"] - grads["as drawn"]).norm() / grads["as drawn"].norm()
        apart = max(apart, difference.item())
    ratios = [a / b for a, b in zip(seconds["sorted"], seconds["as drawn"], strict=True)]
    return {
        "batch_size": batch_size,
        "micro_batch_size": micro_batch_size,
        "steps": steps,
        "cpu_s": seconds,
        "time_sorted_over_drawn": statistics.median(ratios),
        "largest_relative_difference_of_gradients": apart,
    }


def measure_cache(text: Path, tokenizer: Any, *, repeats: int) -> dict[str, Any]:
    """Time tokenising, hashing the text, and finding its tokens again."""
    found: dict[str, list[float]] = {"tokenise_s": [], "hash_text_s": [], "load_tokens_s": []}

    def build() -> TokenDataset:
        return build_token_dataset(load_corpus(str(text)), tokenizer, seq_len=512)

    def measure(name: str, work: Any) -> Any:
        start = time.perf_counter()
        result = work()
        found[name].append(time.perf_counter() - start)
        return result

    tokens = 0
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            dataset = measure("tokenise_s", build)
            load_or_build(Path(folder), {}, build=lambda dataset=dataset: dataset)
            measure("hash_text_s", lambda: compute_source_sha256(str(text)))
            again = measure("load_tokens_s", lambda: load_or_build(Path(folder), {}, build=build))
            tokens = len(again.tokens)
    return {"text_bytes": text.stat().st_size, "tokens": tokens, **found}


def main() -> None:
    """Measure both, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    config = load_config(arguments.model)
    tokenizer = load_tokenizer(arguments.model, config)
    wrapped = attach_lora(load_model(arguments.model), rank=8, alpha=16, dropout=0.0, seed=0)
    for spec in list_group_specs(config):
        for piece in spec.slices:
            linear = wrapped.get_base_model().get_submodule(piece.module)
            torch.nn.init.normal_(get_lora_weights(linear).lora_b, std=0.01)
    seq_len = min(512, config.max_position_embeddings)
    dataset = build_token_dataset(load_corpus(str(arguments.pairs)), tokenizer, seq_len=seq_len)
    batch_size, micro_batch_size = SIZES[0]
    timed = measure_steps(
        wrapped,
        dataset,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        steps=arguments.steps,
    )
    machine = {**describe_machine(), "command": f"python {' '.join(sys.argv)}"}
    lengths = {"shortest": int(dataset.lengths.min()), "mean": float(dataset.lengths.mean()),
               "longest": int(dataset.lengths.max())}  # fmt: skip
    cache = measure_cache(arguments.text, tokenizer, repeats=3)
    save_json(
        arguments.output,
        {
            "machine": machine,
            "pairs": {"rows": len(dataset), "seq_len": seq_len, "tokens": lengths},
            "padding": [
                compute_padding(dataset, batch_size=batch, micro_batch_size=micro)
                for batch, micro in SIZES
            ],
            "steps": timed,
            "cache": cache,
        },
    )


if __name__ == "__main__":
    main()
