"""Run every path of the product once on a GPU, on the demo's model, and compare with a CPU.

    python -m tools.gpu.smoke --output docs/measurements/gpu-smoke.json
    python -m tools.gpu.smoke --device cpu --output smoke.json          the same, on a CPU

The model has a million parameters: the figures say whether a path works, not how fast it is. A
check that fails becomes a row of the JSON, and the others still run.
"""

import functools
import importlib.util
import logging
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import lpdeploy
from lpdeploy.criteria import CRITERIA
from lpdeploy.engines.torch.runner import load_torch_runner
from lpdeploy.engines.verify import build_inputs, collect_logits
from lpdeploy.pruning.training import StepInfo
from tools.measure.common import build_parser, save_measurement

ASSETS = Path(str(resources.files("lpdeploy.demo"))) / "assets"
MODEL, TRAIN, VALID = (str(ASSETS / name) for name in ("story-llama-1M", "train.txt", "valid.txt"))
PROMPTS = ("Once upon a time", "The dog saw a big")
# Small, without dropout (a GPU draws other numbers), and with several events.
OPTIONS = {
    "ratio": 0.5, "steps": 6, "batch_size": 4, "micro_batch_size": 2, "seq_len": 64, "lr": 1e-3,
    "prune_every": 1, "calibration_samples": 8, "lora_dropout": 0.0, "dtype": "fp32",
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    **{f"criterion {name}": {"criterion": name} for name in CRITERIA},
    "off-loaded gradients": {"criterion": "gradient", "offload_gradients": True},
    "bf16": {"dtype": "bf16"},
    "8-bit base": {"load_in": "8bit"},
    "4-bit base": {"load_in": "4bit"},
    "masks": {"removal": "mask"},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "widths of their own": {"scope": "global"},
    "prune once, then train": {"schedule": "separate"},
    "dropout": {"lora_dropout": 0.05},
    "compiled layers": {"compile": True},
    "refit": {"refit": True, "refit_samples": 32},
    "refit over an 8-bit base": {"refit": True, "refit_samples": 32, "load_in": "8bit"},
    "obs with a refit": {"criterion": "obs", "refit": True, "refit_samples": 32},
    "refit with masks": {"refit": True, "refit_samples": 32, "removal": "mask"},
    "distillation": {"distill": 0.5},
    "dropped layers": {"drop_layers": 1, "refit": True, "refit_samples": 32},
    "a guard": {"max_loss_increase": 100.0},
}
NEEDS = dict.fromkeys(("8-bit base", "4-bit base", "refit over an 8-bit base"), "bitsandbytes")


@dataclass(frozen=True)
class Place:
    """Where the checks run, and the folder that they share."""

    device: str
    folder: Path

    def prune(self, name: str, *, device: str | None = None, **changes: Any) -> lpdeploy.Run:
        """Prune the demo's model into a folder of that name."""
        config = lpdeploy.PruneConfig(**{**OPTIONS, "device": device or self.device, **changes})
        return lpdeploy.prune(MODEL, TRAIN, self.folder / name, config=config, overwrite=True)

    @functools.cached_property
    def run(self) -> lpdeploy.Run:
        """A run of this device, merged and unmerged."""
        run = self.prune("run")
        run.compact()
        run.compact(keep_adapter=True)
        return run


def check_training(place: Place, **changes: Any) -> dict[str, Any]:
    """Prune here and on the CPU, and compare the kept groups and the LoRA weights."""
    peak = start_peak(place.device)
    here = place.prune("here", **changes)
    own = {"peak_bytes": torch.cuda.max_memory_allocated() if peak else None}
    if "compile" in changes:
        return own  # only a GPU compiles
    there = place.prune("there", device="cpu", **changes)
    return {**own, **compare_runs(here, there)}


def start_peak(device: str) -> bool:
    """Start to watch the GPU's memory; tell whether there is one."""
    if device == "cpu":
        return False
    torch.cuda.reset_peak_memory_stats()
    return True


def compare_runs(a: lpdeploy.Run, b: lpdeploy.Run) -> dict[str, Any]:
    """Return the share of groups that both keep or both remove, and the distance of LoRA's B A."""
    plans = a.load_plan(), b.load_plan()
    same = total = 0
    for spec in plans[0].specs:
        first, second = (set(plan.kept[spec.name]) for plan in plans)
        same += spec.num_groups - len(first ^ second)
        total += spec.num_groups
    result: dict[str, Any] = {"same_groups": same / total}
    if same == total:
        weights = [load_file(run.adapter / "adapter_model.safetensors") for run in (a, b)]
        largest = max((weights[0][k] - weights[1][k]).abs().max().item() for k in weights[0])
        result["max_abs_diff_lora"] = largest
    return result


def check_resume(place: Place) -> dict[str, Any]:
    """Stop a run after its third step, go on, and compare with one that was never stopped."""

    def stop(step: StepInfo) -> None:
        if step.step == 3:
            raise KeyboardInterrupt

    config = lpdeploy.PruneConfig(**{**OPTIONS, "device": place.device, "checkpoint_every": 1})
    output = place.folder / "stopped"
    try:
        lpdeploy.prune(MODEL, TRAIN, output, config=config, on_step=stop)
    except KeyboardInterrupt:
        resumed = lpdeploy.prune(MODEL, TRAIN, output, config=config, resume=True)
        return compare_runs(resumed, place.prune("whole", checkpoint_every=1))
    raise AssertionError("the run was not stopped")


def check_verify(place: Place) -> dict[str, Any]:
    """Compare all stages of the run that was made here."""
    return place.run.verify(engine="torch").to_json()


def check_logits(place: Place) -> dict[str, Any]:
    """Compare the logits of a prefill and of cached steps with the CPU's."""
    folder = place.run.model
    runners = [load_torch_runner(folder, dtype="fp32", device=d) for d in (place.device, "cpu")]
    rows = build_inputs(runners[0].vocab_size, limit=runners[0].max_positions)
    here, there = (collect_logits(runner, rows) for runner in runners)
    return {
        "max_abs_diff": (here - there).abs().max().item(),
        "max_abs_logit": there.abs().max().item(),
        "top1_agreement": (here.argmax(-1) == there.argmax(-1)).float().mean().item(),
    }


def check_generation(place: Place) -> dict[str, Any]:
    """Generate greedily here and on the CPU."""
    texts = [
        place.run.generate(PROMPTS, device=d, max_new_tokens=32) for d in (place.device, "cpu")
    ]
    return {"equal": texts[0] == texts[1], "text": texts[0]}


def check_perplexity(place: Place) -> dict[str, Any]:
    """Measure perplexity here and on the CPU."""
    found = [
        place.run.evaluate(perplexity=[VALID], seq_len=64, device=d).figures.perplexity[VALID]
        for d in (place.device, "cpu")
    ]
    return {"here": found[0].perplexity, "cpu": found[1].perplexity}


def check_latency(place: Place) -> dict[str, Any]:
    """Time the dense and the pruned model, merged and unmerged."""
    result = place.run.bench(
        forms=(True, False), device=place.device, tokens=32, decode=4, repeats=3
    )
    names = ("ratio", "merged", "phase", "median_ms")
    return {"rows": [{name: row[name] for name in names} for row in result.to_json()["rows"]]}


CHECKS: dict[str, Callable[[Place], dict[str, Any]]] = {
    **{name: functools.partial(check_training, **own) for name, own in VARIANTS.items()},
    "resume": check_resume,
    "verify": check_verify,
    "logits": check_logits,
    "generation": check_generation,
    "perplexity": check_perplexity,
    "latency": check_latency,
}


def run_check(name: str, place: Place) -> dict[str, Any]:
    """Run one check; an error becomes its result."""
    need = NEEDS.get(name)
    if need and importlib.util.find_spec(need) is None:
        return {"skipped": f"{need} is not installed"}
    start = time.perf_counter()
    try:
        result = CHECKS[name](place)
    except Exception as error:  # noqa: BLE001 - the other checks still run
        frames = traceback.extract_tb(error.__traceback__)[-3:]
        where = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
        result = {"failed": f"{type(error).__name__}: {str(error).strip()[:500]}", "at": where}
    return {**result, "seconds": round(time.perf_counter() - start, 1)}


def main() -> None:
    """Read the command line, run the checks, and save what they found."""
    parser = build_parser(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=", ".join(CHECKS))
    options = parser.parse_args()
    logging.getLogger("lpdeploy").addHandler(logging.NullHandler())
    place = Place(options.device, Path(tempfile.mkdtemp(prefix="lpdeploy-smoke-")))
    rows = {}
    try:
        for name in options.checks or CHECKS:
            rows[name] = run_check(name, place)
            print(f"{name}: {rows[name]}"[:300], file=sys.stderr, flush=True)
            save_measurement(options.output, {"device": options.device, "checks": rows})
    finally:
        shutil.rmtree(place.folder, ignore_errors=True)
    failed = [name for name, row in rows.items() if "failed" in row]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
