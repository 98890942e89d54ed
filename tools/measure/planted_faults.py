"""Plant faults in a model's stages, and see whether verify finds them.

    python -m tools.measure.planted_faults MODEL --data TEXT --output docs/measurements/faults.json

Prunes two steps, compacts in the checkpoint's own precision, and then plants each fault as if
compact had written it, or as if an export had been made from it.
"""

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lpdeploy.artifacts import save_json
from lpdeploy.config import PruneConfig
from lpdeploy.engines import get_engine
from lpdeploy.engines.export import export
from lpdeploy.engines.verification import VerifyResult
from lpdeploy.engines.verify import verify
from lpdeploy.folders import FOLDER_RECORD, atomic_folder
from lpdeploy.models.compact import compact
from lpdeploy.models.loading import compute_model_sha256
from lpdeploy.pruning.run import prune
from tools.measure.common import build_parser, save_measurement

FAULTS = ("two heads swapped", "a channel off by one", "a layer unmerged")
EXPORTS = (("ort", "fp32"), ("ort", "fp16"), ("ort", "int8"), ("ort", "int4"), ("onnx", "fp16"))


def plant(fault: str, tensors: dict[str, Tensor], unmerged: dict[str, Tensor]) -> None:
    """Plant a fault in the middle layer of a checkpoint."""
    layers = {int(name.split(".")[2]) for name in tensors if name.startswith("model.layers.")}
    layer = f"model.layers.{max(layers) // 2}."
    o_proj, down = f"{layer}self_attn.o_proj.weight", f"{layer}mlp.down_proj.weight"
    if fault == "two heads swapped":
        head = 64 if tensors[o_proj].shape[1] % 64 == 0 else 16
        one, other, *rest = tensors[o_proj].split(head, dim=1)
        tensors[o_proj] = torch.cat([other, one, *rest], dim=1)
    elif fault == "a channel off by one":
        weight = tensors[down]
        tensors[down] = torch.cat([weight[:, :5], weight[:, 6:7], weight[:, 6:]], dim=1)
    else:
        tensors |= {n: unmerged[n] for n in tensors if n.startswith(layer) and "_proj" in n}


def write_fault(run: Path, fault: str) -> Path:
    """Write a model with a fault as compact would have recorded it; return the whole one."""
    whole = run / "whole"
    (run / "model").rename(whole)
    with atomic_folder(run / "model", kind="model") as folder:
        shutil.copytree(whole, folder, dirs_exist_ok=True)
        (folder / FOLDER_RECORD).unlink()
        tensors = load_file(folder / "model.safetensors")
        plant(fault, tensors, load_file(run / "unmerged" / "model.safetensors"))
        tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return whole


def restore(run: Path, whole: Path) -> None:
    """Put the whole model back."""
    shutil.rmtree(run / "model")
    whole.rename(run / "model")


def export_fault(run: Path, fault: str, engine: str, precision: str) -> None:
    """Export a faulty checkpoint, and record it as made from the whole one."""
    whole = write_fault(run, fault)
    export(str(run), engine=engine, precision=precision, overwrite=True)
    restore(run, whole)
    contract, made = get_engine(engine).contract_file, run / engine
    data = json.loads((made / contract).read_text(encoding="utf-8"))
    data["source"]["sha256"] = compute_model_sha256(run / "model")
    with atomic_folder(made, kind="export", overwrite=True) as folder:
        shutil.copytree(made, folder, dirs_exist_ok=True)
        (folder / FOLDER_RECORD).unlink()
        save_json(folder / contract, data)


def describe(result: VerifyResult, stage: str) -> dict[str, Any]:
    """Return what verify found of a stage."""
    (pair,) = (pair for pair in result.pairs if pair.b == stage)
    (check,) = (check for check in result.weights if check.b == stage)
    return {
        "found": not (pair.ok and check.ok),
        "found_by_logits": not pair.ok,
        "wrong_weights": len(check.wrong),
        "max_abs_diff": pair.max_abs_diff,
        "tolerance": pair.tolerance,
        "max_abs_logit": pair.max_abs_logit,
    }


def measure(run: Path) -> list[dict[str, Any]]:
    """Plant every fault in every stage, and none in each."""
    rows = []
    for fault in (None, *FAULTS):
        whole = write_fault(run, fault) if fault else None
        row = {"stage": "compact", "fault": fault}
        rows.append(row | describe(verify(run, engine="torch"), "compact/torch"))
        if whole:
            restore(run, whole)
        for engine, precision in EXPORTS:
            if fault:
                export_fault(run, fault, engine, precision)
            else:
                export(str(run), engine=engine, precision=precision, overwrite=True)
            row = {"stage": f"{engine} {precision}", "fault": fault}
            rows.append(row | describe(verify(run, engine=engine), engine))
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def main() -> None:
    """Prune, plant, verify, and write the JSON."""
    parser = build_parser(__doc__)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    arguments = parser.parse_args()
    options = PruneConfig(
        steps=2, batch_size=2, micro_batch_size=1, seq_len=64, lr=1e-3, prune_every=1, ratio=0.34,
        prune_warmup=0.0, calibration_samples=4, round_to=32, device="cpu",
    )  # fmt: skip
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        prune(arguments.model, run, data=arguments.data, options=options)
        compact(run)
        compact(run, keep_adapter=True)
        rows = measure(run)
    seconds = round(time.perf_counter() - start, 1)
    name = Path(arguments.model).name
    save_measurement(arguments.output, {"model": name, "rows": rows, "seconds": seconds})


if __name__ == "__main__":
    main()
