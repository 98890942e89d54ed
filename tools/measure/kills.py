"""Kill runs of `prune` at random moments, resume them, and compare with runs never killed.

    python -m tools.measure.kills --output docs/measurements/kills.json

Each case (a model, data and options) runs once without a kill. Then the same run is killed by
SIGKILL at random moments, from loading to the last file written, and resumed until it ends. After
each kill, every file under its final name must be whole. Every run must end with the same bytes of
plan, adapter and scores. One process imports the libraries and is forked for each attempt, because
importing takes longer than such a short run. It starts no thread of its own.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import accelerate  # noqa: F401 - so that no attempt has to import it
import peft  # noqa: F401
import torch
import transformers.models.llama.modeling_llama  # noqa: F401
import yaml
from safetensors import safe_open

from lpdeploy.artifacts import check_unchanged
from lpdeploy.config import PruneConfig
from lpdeploy.manifest import load_stage
from lpdeploy.models.adapters import load_adapter
from lpdeploy.pruning.run import prune
from lpdeploy.run_folder import RunFolder
from tools.measure.common import build_parser, save_measurement

ASSETS = Path(str(resources.files("lpdeploy.demo"))) / "assets"
RESULTS = ("plan.json", "adapter/adapter_model.safetensors", "importance.safetensors")
_COMMON = {
    "steps": 12,
    "batch_size": 2,
    "micro_batch_size": 1,
    "seq_len": 32,
    "prune_every": 2,
    "checkpoint_every": 2,
    "calibration_samples": 2,
    "round_to": 8,
    "device": "cpu",
}
CASES = {
    "cut": {},
    "mask, global": {"removal": "mask", "scope": "global"},
    "gate, one checkpoint a step": {"criterion": "gate", "checkpoint_every": 1},
    "separate, wanda": {"schedule": "separate", "criterion": "wanda"},
    "instruction pairs": {"seq_len": 96},
}


class KillTestError(Exception):
    """A killed run ended otherwise than the run never killed, or left half a file."""


def attempt(run: Path, case: str, text: Path, *, kill_after: float | None) -> bool:
    """Run or resume in a process of its own; return whether it was killed before its end."""

    def work() -> None:
        begun = RunFolder(run).checkpoint.is_file()
        options = PruneConfig(**{**_COMMON, **CASES[case]})
        model = str(ASSETS / "story-llama-1M")
        prune(model, run, data=str(text), options=options, resume=begun, overwrite=not begun)

    return fork(work, log=run.parent / "attempt.log", kill_after=kill_after)


def fork(work: Callable[[], object], *, log: Path, kill_after: float | None) -> bool:
    """Do something in a forked process, and kill that after a while.

    Args:
        work: What to do.
        log: File for what it prints.
        kill_after: Seconds; None to let it end.

    Returns:
        Whether the kill came before its end.

    Raises:
        KillTestError: It failed by itself.
    """
    pid = os.fork()
    if not pid:
        _run_and_exit(work, log)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return True
    if os.WEXITSTATUS(status):
        raise KillTestError(log.read_text(encoding="utf-8"))
    return False


def _run_and_exit(work: Callable[[], object], log: Path) -> NoReturn:
    failed = 1
    try:
        sys.stdout = sys.stderr = log.open("w", encoding="utf-8")
        torch.set_num_threads(1)
        work()
        failed = 0
    except BaseException:  # noqa: BLE001 - the exit code tells the parent, and the log says why
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(failed)  # without cleaning up what is the parent's


def list_files(run: Path) -> Iterator[Path]:
    """List the files of a run that have their final names."""
    for path in run.iterdir() if run.is_dir() else []:
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from list_files(path)
        else:
            yield path


def check_whole(run: Path) -> None:
    """Read every file under its final name.

    Raises:
        KillTestError: One is not whole.
    """
    try:
        for path in list_files(run):
            _read(path)
        if (run / "adapter").exists():
            load_adapter(run / "adapter")
        if RunFolder(run).is_complete:  # then everything else is there, too
            RunFolder(run).load_plan()
            check_unchanged(run / "adapter", load_stage(run, "prune").outputs["adapter"], fix="")
            compute_hashes(run)
    except Exception as error:
        raise KillTestError(f"'{run}' is not whole: {error!r}") from error


def _read(path: Path) -> None:
    match path.suffix:
        case ".safetensors":
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    file.get_tensor(name).clone()
        case ".json":
            json.loads(path.read_text(encoding="utf-8"))
        case ".jsonl":
            text = path.read_text(encoding="utf-8")
            if not text.endswith("\n") and text:
                raise KillTestError(f"the last line of '{path}' is not whole")
            for line in text.splitlines():
                json.loads(line)
        case ".yaml":
            yaml.safe_load(path.read_text(encoding="utf-8"))["prune"]


def compute_hashes(run: Path) -> dict[str, str]:
    """Hash what a run ends with."""
    return {name: hashlib.sha256((run / name).read_bytes()).hexdigest() for name in RESULTS}


def count_steps(run: Path) -> int:
    """Count the steps that a run has logged."""
    path = run / "log.jsonl"
    return len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0


def describe_moment(run: Path, steps_before: int) -> str:
    """Say when a kill came, judging by what it left."""
    if (run / "plan.json").exists():
        return "after the plan was written"
    if any(run.rglob(".*.tmp-*")) or any(run.rglob(".*.old-*")):
        return "while a file was written"
    if (run / "manifest.json").exists() or (run / "adapter").exists():
        return "between the results"
    return "while loading" if count_steps(run) <= steps_before else "in training"


def save_pairs(path: Path) -> Path:
    """Save instruction pairs of very different lengths, from the demo's text."""
    words = (ASSETS / "train.txt").read_text(encoding="utf-8").split()[:6000]
    rows = []
    for number in range(60):
        part = words[number * 60 : number * 60 + 4 + number % 40]
        rows.append({"instruction": " ".join(part[:3]), "output": " ".join(part[3:])})
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def kill_often(kills: int, scratch: Path, *, seed: int) -> dict[str, Any]:
    """Kill until there were enough kills, each run of them resumed to its end.

    Raises:
        KillTestError: A file was not whole, or a run ended otherwise than the run never killed.
    """
    texts = dict.fromkeys(CASES, ASSETS / "train.txt")
    texts["instruction pairs"] = save_pairs(scratch / "pairs.json")
    generator = random.Random(seed)
    expected: dict[str, dict[str, str]] = {}
    seconds: dict[str, float] = {}
    moments: Counter[str] = Counter()
    runs: Counter[str] = Counter()
    names = list(CASES)
    while moments.total() < kills:
        case = names[runs.total() % len(names)]
        if case not in expected:
            attempt(scratch / "whole", case, texts[case], kill_after=None)  # fills the cache
            start = time.perf_counter()
            attempt(scratch / "whole", case, texts[case], kill_after=None)
            seconds[case] = time.perf_counter() - start
            expected[case] = compute_hashes(scratch / "whole")
        run = scratch / "run"
        while not (run / "plan.json").exists():
            moment = generator.uniform(0, 1.05 * seconds[case])
            steps = count_steps(run)
            if moments.total() >= kills:
                attempt(run, case, texts[case], kill_after=None)
            elif attempt(run, case, texts[case], kill_after=moment):
                came = describe_moment(run, steps)
                moments[came] += 1
                # Follow the machine's speed, which drifts.
                seconds[case] *= 1.1 if came == "while loading" else 0.98
            else:
                seconds[case] = min(seconds[case], moment)
            check_whole(run)
        if compute_hashes(run) != expected[case]:
            raise KillTestError(f"{case}: the run that was killed ended otherwise")
        runs[case] += 1
        shutil.rmtree(run)
        print(f"{dict(moments)}, {runs.total()} runs", file=sys.stderr, flush=True)
    return {"kills": moments.total(), "moments": dict(moments), "runs": dict(runs)}


def count_threads() -> int:
    """Count the threads of this process, those of libraries included."""
    return len(list(Path("/proc/self/task").iterdir()))


def main() -> None:
    """Kill, resume, compare, and write the JSON."""
    parser = build_parser(__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if count_threads() > 1:
        raise SystemExit("A library has started a thread, so this process cannot be forked.")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["LPDEPLOY_CACHE"] = f"{scratch}/cache"
        result = kill_often(arguments.kills, Path(scratch), seed=arguments.seed)
    result |= {"seed": arguments.seed, "seconds": round(time.perf_counter() - start, 1)}
    options = {name: {**_COMMON, **case} for name, case in CASES.items()}
    save_measurement(arguments.output, {**result, "options": options})


if __name__ == "__main__":
    main()
