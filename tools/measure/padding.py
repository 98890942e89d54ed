"""Compute how much padding is saved by sorting the rows of a step by length.

    python -m tools.measure.padding MODEL --pairs alpaca.json --output padding.json

The script takes instruction pairs in the order in which training draws them, deals them into
micro-batches as they come and sorted by length, and writes the share of padding in both.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lpdeploy.data.batches import TokenDataset, build_token_dataset, list_batch, split_batch
from lpdeploy.data.sources import load_corpus
from lpdeploy.models.loading import load_config, load_tokenizer
from tools.measure.common import build_parser, save_measurement

SIZES = ((32, 4), (128, 4), (128, 16))  # rows of a step, of a micro-batch


def split_unsorted(rows: Sequence[int], size: int) -> list[list[int]]:
    """Deal rows into micro-batches as they come."""
    return [list(rows[i : i + size]) for i in range(0, len(rows), size)]


def count_tokens(micros: list[list[int]], dataset: TokenDataset) -> tuple[int, int]:
    """Count tokens without and with padding."""
    used = sum(int(dataset.lengths[micro].sum()) for micro in micros)
    return used, sum(len(micro) * int(dataset.lengths[micro].max()) for micro in micros)


def compute_padding(
    dataset: TokenDataset, *, batch_size: int, micro_batch_size: int
) -> dict[str, Any]:
    """Compute the share of padding of both orders over one pass."""
    counts: dict[str, list[tuple[int, int]]] = {"as drawn": [], "sorted": []}
    for step in range(len(dataset) // batch_size):
        rows = list_batch(len(dataset), step=step, batch_size=batch_size, seed=0)
        drawn = split_unsorted(rows, micro_batch_size)
        ordered = split_batch(rows, dataset.lengths, micro_batch_size=micro_batch_size)
        counts["as drawn"].append(count_tokens(drawn, dataset))
        counts["sorted"].append(count_tokens(ordered, dataset))
    shares = {
        name: 1 - sum(used for used, _ in pairs) / sum(padded for _, padded in pairs)
        for name, pairs in counts.items()
    }
    return {"batch_size": batch_size, "micro_batch_size": micro_batch_size, **shares}


def main() -> None:
    """Read the command line, compute, and write the JSON."""
    parser = build_parser(__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--pairs", type=Path, required=True, help="JSON with instruction pairs")
    options = parser.parse_args()
    config = load_config(options.model)
    tokenizer = load_tokenizer(options.model, config)
    seq_len = min(512, config.max_position_embeddings)
    dataset = build_token_dataset(load_corpus(str(options.pairs)), tokenizer, seq_len=seq_len)
    lengths = {"shortest": int(dataset.lengths.min()), "mean": float(dataset.lengths.mean()),
               "longest": int(dataset.lengths.max())}  # fmt: skip
    padding = [
        compute_padding(dataset, batch_size=batch, micro_batch_size=micro) for batch, micro in SIZES
    ]
    pairs = {"rows": len(dataset), "seq_len": seq_len, "tokens": lengths}
    save_measurement(options.output, {"pairs": pairs, "padding": padding})


if __name__ == "__main__":
    main()
