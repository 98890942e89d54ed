"""Compare the memory that `prune` plans with the memory that runs then take, on a CPU.

    python -m tools.measure.memory --output docs/measurements/memory-plan-cpu.json
    python -m tools.measure.memory --size tiny --output x.json

Each case runs in its own process: a LLaMA with random weights takes two steps of two micro-batches
of random tokens, just as `lpdeploy prune` does. The models are large enough that the memory of the
libraries themselves does not hide an error.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from lpdeploy.artifacts import save_json
from lpdeploy.benchmark.pruning_worker import PruningVariant, start_pruning
from lpdeploy.config import PruneConfig
from lpdeploy.pruning.memory import plan_memory
from tools.measure.common import build_parser, save_measurement

SHAPES = {
    "109M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
             "num_attention_heads": 12},
    "wide": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8,
             "num_attention_heads": 16, "num_key_value_heads": 4},
    "deep": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 20,
             "num_attention_heads": 8},
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4},
}  # fmt: skip
# Shape, and what differs from criterion lora with micro-batches of 1 x 512 tokens.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("109M", {}),
    ("109M", {"seq_len": 256}),
    ("109M", {"micro_batch_size": 2, "batch_size": 4}),
    ("109M", {"gradient_checkpointing": True}),
    ("109M", {"criterion": "gradient"}),
    ("109M", {"lora_dropout": 0.0}),
    ("109M", {"load_in": "8bit"}),
    ("wide", {}),
    ("wide", {"gradient_checkpointing": True, "criterion": "gradient"}),
    ("deep", {"criterion": "wanda"}),
]


def build_case(shape: str, changes: dict[str, Any]) -> tuple[LlamaConfig, PruneConfig]:
    """Return the config of a case, and the options it is pruned with."""
    vocab = 64 if shape == "tiny" else 32000
    config = LlamaConfig(
        vocab_size=vocab, max_position_embeddings=2048, tie_word_embeddings=True, **SHAPES[shape]
    )
    base: dict[str, Any] = {"batch_size": 2, "micro_batch_size": 1, "seq_len": 512, "device": "cpu"}
    return config, PruneConfig(**{**base, "steps": 2, "calibration_samples": 0, **changes})


def measure(shape: str, changes: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run one case in its own process."""
    config, options = build_case(shape, changes)
    config.save_pretrained(folder)
    with start_pruning(PruningVariant(folder, options)) as worker:
        peaks = [worker.call("step").peak_bytes for _ in range(2)]
        process = worker.described.process_bytes
    return {
        "shape": shape,
        "options": changes,
        "process_bytes": process,
        "measured_bytes": max(peaks),
    }


def plan(row: dict[str, Any]) -> dict[str, Any]:
    """Add the plan to what was measured."""
    config, options = build_case(row["shape"], row["options"])
    process = row["process_bytes"]
    parts = plan_memory(config, options, dtype="fp32", device="cpu", process=process)
    error = parts.total / row["measured_bytes"] - 1
    return {**row, "planned_bytes": parts.to_json(), "error": error}


def main() -> None:
    """Read the command line, measure, print, and write the JSON."""
    parser = build_parser(__doc__)
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument(
        "--replan", action="store_true", help="plan again for the measurements in --output"
    )
    options = parser.parse_args()
    if options.replan:
        document = json.loads(options.output.read_text(encoding="utf-8"))
        rows = [show(plan(row)) for row in document["rows"]]
        save_json(options.output, document | {"rows": rows})  # the machine stays the measured one
    else:
        cases = CASES if options.size == "full" else [("tiny", {"seq_len": 16})]
        rows = measure_all(cases)
        save_measurement(options.output, {"rows": rows})
    print(f"largest error {max(abs(row['error']) for row in rows):.1%}")


def measure_all(cases: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Run the cases, one after another."""
    rows = []
    for shape, changes in cases:
        with tempfile.TemporaryDirectory(prefix="lpdeploy-memory-") as folder:
            rows.append(show(plan(measure(shape, changes, Path(folder)))))
    return rows


def show(row: dict[str, Any]) -> dict[str, Any]:
    """Print a row."""
    planned, measured = row["planned_bytes"]["total"] / 1e6, row["measured_bytes"] / 1e6
    print(
        f"{row['shape']} {json.dumps(row['options'])}: planned {planned:,.0f} MB, "
        f"measured {measured:,.0f} MB, {row['error']:+.1%}",
        file=sys.stderr,
        flush=True,
    )
    return row


if __name__ == "__main__":
    main()
