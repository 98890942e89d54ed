"""Time `compact` of a large checkpoint against copying its files, and take its peak memory.

    python tools/measure_compact.py --output docs/measurements/compact-cpu.json

The checkpoints have random weights, 2.7 GB each: in float32 and in bfloat16, as one file and in
shards; the plan keeps half of all heads and channels, with a random adapter of rank 8. Copying and
compacting take turns. Compact is a process of its own, whose peak (VmHWM) counts the libraries and
whatever it maps of the base; its seconds begin when the libraries are imported. Files are in the
page cache and are not synced to the disk, in both.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lpdeploy.artifacts import describe_machine, save_json
from lpdeploy.families.groups import LINEARS, list_group_specs
from lpdeploy.models.loading import (
    compute_model_sha256,
    get_model_classes,
    list_weight_files,
    load_config,
)
from lpdeploy.models.shapes import compute_achieved
from lpdeploy.plan import GroupSpec, PruningPlan

# Name -> (dtype, layers, shards): TinyLlama's shape, as deep as gives 2.7 GB.
BASES = {
    "fp32, one file": (torch.float32, 11, 1),
    "bf16, one file": (torch.bfloat16, 24, 1),
    "bf16, 3 shards": (torch.bfloat16, 24, 3),
}
_SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
_RANK = 8

_COMPACT = """
import json, sys, time
from pathlib import Path
import peft, transformers.models.llama.modeling_llama
from lpdeploy.models.compact import compact
before, used = time.perf_counter(), time.process_time()
compact(Path(sys.argv[1]), overwrite=True)
seconds, used = time.perf_counter() - before, time.process_time() - used
lines = Path("/proc/self/status").read_text().splitlines()
peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
print(json.dumps({"seconds": seconds, "cpu_s": used, "peak_bytes": peak}))
"""


def save_base(folder: Path, dtype: torch.dtype, layers: int, shards: int) -> Path:
    """Save a random LLaMA, shard by shard."""
    config_class, model_class = get_model_classes("llama")
    config = config_class(**_SHAPE, num_hidden_layers=layers, dtype=dtype)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in model_class(config).state_dict().items()}
    names = list(shapes)
    size = -(-len(names) // shards)
    weight_map = {}
    torch.manual_seed(0)
    for number, start in enumerate(range(0, len(names), size), start=1):
        part = names[start : start + size]
        file = f"model-{number:05d}-of-{shards:05d}.safetensors"
        file = "model.safetensors" if shards == 1 else file
        tensors = {name: (0.02 * torch.randn(shapes[name])).to(dtype) for name in part}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        save_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    return folder


def save_run(folder: Path, base: Path) -> Path:
    """Save what ``prune`` leaves: a plan that keeps half of everything, and an adapter."""
    config = load_config(base)
    specs = list_group_specs(config)
    torch.manual_seed(1)
    kept = {
        s.name: sorted(torch.randperm(s.num_groups)[: s.num_groups // 2].tolist()) for s in specs
    }
    plan = PruningPlan(
        base_model=str(base),
        base_sha256=compute_model_sha256(base),
        ratio=0.5,
        specs=specs,
        kept=kept,
        achieved=compute_achieved(config, specs, kept),
    )
    save_json(folder / "plan.json", plan.to_json())
    (folder / "adapter").mkdir()
    tensors = build_adapter(specs, kept, config.hidden_size)
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    adapter = {"peft_type": "LORA", "r": _RANK, "lora_alpha": 16, "target_modules": list(LINEARS)}
    save_json(folder / "adapter" / "adapter_config.json", adapter)
    return folder


def build_adapter(
    specs: tuple[GroupSpec, ...], kept: dict[str, list[int]], hidden: int
) -> dict[str, torch.Tensor]:
    """Build random factors of the pruned shapes."""
    tensors = {}
    for spec in specs:
        for piece in spec.slices:
            width = len(kept[spec.name]) * piece.block
            rows, columns = (width, hidden) if piece.dim == 0 else (hidden, width)
            name = f"base_model.model.{piece.module}"
            tensors[f"{name}.lora_A.weight"] = 0.02 * torch.randn(_RANK, columns)
            tensors[f"{name}.lora_B.weight"] = 0.02 * torch.randn(rows, _RANK)
    return tensors


def time_copy(base: Path, scratch: Path) -> dict[str, float]:
    """Copy the weight files; return seconds of the clock and of the processor."""
    scratch.mkdir()
    start, used = time.perf_counter(), time.process_time()
    for file in list_weight_files(base):
        shutil.copyfile(file, scratch / file.name)
    result = {"seconds": time.perf_counter() - start, "cpu_s": time.process_time() - used}
    shutil.rmtree(scratch)
    return result


def time_compact(run: Path) -> dict[str, float]:
    """Compact in a process of its own; return seconds of the call and of the process, and peak."""
    shutil.rmtree(run / "model", ignore_errors=True)
    start = time.perf_counter()
    command = [sys.executable, "-c", _COMPACT, str(run)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    whole = time.perf_counter() - start
    return {**json.loads(done.stdout.splitlines()[-1]), "process_seconds": whole}


def measure(name: str, *, repeats: int, scratch: Path) -> dict[str, Any]:
    """Measure one kind of checkpoint."""
    base = save_base(scratch / "base", *BASES[name])
    run = save_run(scratch / "run", base)
    size = sum(file.stat().st_size for file in list_weight_files(base))
    copies, compacts = [], []
    for _ in range(repeats):  # what was just written is in the page cache
        copied, compacted = time_copy(base, scratch / "copy"), time_compact(run)
        print(f"{name}: copy {copied}, compact {compacted}", file=sys.stderr, flush=True)
        copies.append(copied)
        compacts.append(compacted)
    result = {
        "base": name,
        "bytes": size,
        "copy": copies,
        "compact": compacts,
        "time_over_copy": statistics.median(
            c["seconds"] / copy["seconds"] for c, copy in zip(compacts, copies, strict=True)
        ),
        "cpu_over_copy": statistics.median(
            c["cpu_s"] / copy["cpu_s"] for c, copy in zip(compacts, copies, strict=True)
        ),
        "peak_bytes": max(c["peak_bytes"] for c in compacts),
    }
    shutil.rmtree(base)
    shutil.rmtree(run)
    return result


def main() -> None:
    """Measure all, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=BASES, help="One kind of checkpoint.")
    parser.add_argument("--scratch", type=Path, help="Where 9 GB fit; a temporary folder else.")
    arguments = parser.parse_args()
    names = [arguments.only] if arguments.only else list(BASES)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        rows = []
        for name in names:
            rows.append(measure(name, repeats=arguments.repeats, scratch=Path(scratch)))
            machine = {**describe_machine(), "command": f"python {' '.join(sys.argv)}"}
            save_json(arguments.output, {"machine": machine, "rows": rows})


if __name__ == "__main__":
    main()
