"""Plan 7B, 65B and 70B on one and on eight GPUs: computed from shapes, not measured.

    python -m tools.measure.scaling --output docs/measurements/scaling-plan.json

Memory is what `prune` plans (`lpdeploy/pruning/memory.py`; `tools.measure.memory` checks its terms
on a CPU). Operations are counted from the shapes. Hours assume the speed of the paper's own
LLaMA-7B run.
"""

from typing import Any

from transformers import LlamaConfig

from lpdeploy.config import PruneConfig
from lpdeploy.criteria import CRITERIA
from lpdeploy.models.costs import compute_scoring_flops, compute_training_flops
from lpdeploy.models.shapes import list_projections, list_widths
from lpdeploy.pruning.memory import plan_memory
from tools.measure.common import build_parser, save_measurement

MODELS = {
    "LLaMA-7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                 "num_attention_heads": 32, "num_key_value_heads": 32},
    "LLaMA-65B": {"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80,
                  "num_attention_heads": 64, "num_key_value_heads": 64},
    "Llama-2-70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                    "num_attention_heads": 64, "num_key_value_heads": 8},
}  # fmt: skip
# GPUs, whether the layers' weights are sharded over them, base, checkpointing, micro-batch.
CASES: list[tuple[int, bool, str | None, bool, int]] = [
    (1, False, None, False, 1),
    (1, False, "8bit", True, 1),
    (1, False, "4bit", True, 1),
    (8, False, "8bit", True, 1),
    (8, True, None, False, 1),
    (8, True, None, True, 4),
]
STEPS = 312  # two epochs over the paper's 20,000 sequences at batch 128
CONSTANTS = {
    "gpu_bytes": {"value": 80_000_000_000, "source": "the paper's GPU, A100 80 GB, section 4.1"},
    "flops_per_s": {
        "value": 12881e9 * 128 / 14.13,
        "source": "the paper's Tables 4 and 6: 12881 GFLOP a sequence, 128 a step of 14.13 s",
    },
}


def plan(name: str, case: tuple[int, bool, str | None, bool, int]) -> dict[str, Any]:
    """Plan one model in one setting."""
    gpus, sharded, load_in, checkpointing, micro = case
    config = LlamaConfig(vocab_size=32000, **MODELS[name])
    options = PruneConfig(
        micro_batch_size=micro, load_in=load_in, gradient_checkpointing=checkpointing
    )
    shards = gpus if sharded else 1
    memory = plan_memory(config, options, dtype="bf16", device="cuda", shards=shards)
    flops = compute_training_flops(
        config, tokens=options.seq_len, batch=options.batch_size, rank=options.lora_rank,
        checkpointing=checkpointing,
    )  # fmt: skip
    scoring = CRITERIA[options.criterion]
    flops += compute_scoring_flops(config, rank=options.lora_rank, criterion=scoring)
    sizes = [size for width in list_widths(config) for size in list_projections(config, width)]
    passes = 3 if checkpointing else 2  # forward, recomputed forward, backward
    rounds = options.batch_size // (micro * gpus)
    gathered = 2 * sum(i * o for i, o in sizes) * (gpus - 1) // gpus * passes * rounds
    exchanged = 4 * options.lora_rank * sum(i + o for i, o in sizes)
    rate = CONSTANTS["flops_per_s"]["value"]
    return {
        "model": name,
        "gpus": gpus,
        "sharded": sharded,
        "load_in": load_in,
        "gradient_checkpointing": checkpointing,
        "micro_batch_size": micro,
        "bytes": memory.to_json(),
        "fits": memory.total <= CONSTANTS["gpu_bytes"]["value"],
        "step_flops": flops,
        "run_hours": STEPS * flops / gpus / rate / 3600,
        "lora_bytes_a_step": exchanged if gpus > 1 else 0,
        "weight_bytes_a_step": gathered if sharded else 0,
    }


def main() -> None:
    """Read the command line, plan, and write the JSON."""
    output = build_parser(__doc__).parse_args().output
    rows = [plan(name, case) for name in MODELS for case in CASES]
    setting = {"batch_size": 128, "seq_len": 512, "lora_rank": 8, "dtype": "bf16", "steps": STEPS}
    made = {"computed": "from shapes; nothing here was measured", "setting": setting}
    save_measurement(output, {**made, "constants": CONSTANTS, "rows": rows})


if __name__ == "__main__":
    main()
