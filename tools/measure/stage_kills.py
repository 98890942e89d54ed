"""Kill compact, export, package and report at random moments, and look at what is left.

    python -m tools.measure.stage_kills --kills 300 --output docs/measurements/stage-kills.json

Each stage replaces its own earlier result in a finished run. After each kill by SIGKILL, every file
of the run that is not the stage's must be as before, and what stands under the result's final name
must be whole. Then the stage runs to its end, which must give the same bytes as without a kill.
"""

import hashlib
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import jinja2  # noqa: F401 - so that no attempt has to import it
import onnx_ir  # noqa: F401

from lpdeploy.config import PruneConfig
from lpdeploy.engines.export import export
from lpdeploy.folders import FOLDER_RECORD, check_untouched
from lpdeploy.models.compact import compact
from lpdeploy.pruning.run import prune
from lpdeploy.report.page import save_report
from lpdeploy.servers.package import package
from tools.measure.common import build_parser, save_measurement
from tools.measure.kills import ASSETS, KillTestError, count_threads, fork

_RECORDED = (FOLDER_RECORD, "manifest.json", "lpdeploy.json", "io.json", "report.html")
"""They hold times and versions."""

Stage = tuple[str, Callable[[], object]]


def list_stages(run: Path) -> dict[str, Stage]:
    """Return each stage's result, and the function that makes it anew."""
    return {
        "compact": (
            "unmerged",
            lambda: compact(run, keep_adapter=True, overwrite=True),
        ),
        "export --engine ort": ("ort", lambda: export(str(run), engine="ort", overwrite=True)),
        "export --precision int4": (
            "int4",
            lambda: export(
                str(run), engine="ort", precision="int4", output=run / "int4", overwrite=True
            ),
        ),
        "package --target llamacpp": (
            "gguf",
            lambda: package(run, kind="llamacpp", output=run / "gguf", overwrite=True),
        ),
        "package --target triton": (
            "triton",
            lambda: package(run, kind="triton", output=run / "triton", overwrite=True),
        ),
        "report": ("report.html", lambda: save_report(run)),
    }


def make_run(run: Path) -> None:
    """Make a finished run for the stages to work on."""
    options = PruneConfig(
        steps=2, batch_size=2, micro_batch_size=2, seq_len=32, prune_every=1, device="cpu",
        calibration_samples=2,
    )  # fmt: skip
    prune(str(ASSETS / "story-llama-1M"), run, data=str(ASSETS / "valid.txt"), options=options)
    compact(run)


def read(folder: Path, *, below: str | None = None, without: str | None = None) -> dict[str, str]:
    """Hash the files of a run that have their final names, but for those that hold times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        inside = name.split("/", maxsplit=1)[0]
        if path.is_dir() or hidden or path.name in _RECORDED:
            continue
        if (below is None or inside == below) and inside != without:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def check_left(run: Path, result: str, others: dict[str, str]) -> str:
    """Check what a kill left, and say what stands under the result's name.

    Raises:
        KillTestError: Something else changed, or the result is not whole.
    """
    if read(run, without=result) != others:
        raise KillTestError(f"a kill while '{result}' was made changed another file")
    path = run / result
    if not path.exists():
        return "between two renames: the old result has another name"
    if path.is_dir():
        check_untouched(path, fix="", always_hash=True)
    elif not path.read_text(encoding="utf-8").rstrip().endswith("</html>"):
        raise KillTestError(f"'{path}' is not whole")
    half = any(path.name.startswith(f".{result}.tmp-") for path in run.iterdir())
    return "while the new result was written" if half else "before or after it was written"


def kill_often(kills: int, scratch: Path, *, seed: int) -> dict[str, Any]:
    """Kill each stage in turn until there were enough kills.

    Raises:
        KillTestError: A kill left something else than the old or the new result.
    """
    run, log = scratch / "run", scratch / "attempt.log"
    fork(lambda: make_run(run), log=log, kill_after=None)
    generator = random.Random(seed)
    stages, moments = list_stages(run), Counter[str]()
    seconds, expected, counted = {}, {}, Counter[str]()
    for name, (result, work) in stages.items():
        fork(work, log=log, kill_after=None)
        start = time.perf_counter()
        fork(work, log=log, kill_after=None)
        seconds[name] = time.perf_counter() - start
        expected[name] = read(run, below=result)
    while counted.total() < kills:
        for name, (result, work) in stages.items():
            others = read(run, without=result)
            if fork(work, log=log, kill_after=generator.uniform(0, 1.05 * seconds[name])):
                counted[name] += 1
                moments[check_left(run, result, others)] += 1
            fork(work, log=log, kill_after=None)
            if read(run, below=result) != expected[name]:
                raise KillTestError(f"{name}: after a kill it made something else")
            left = [path.name for path in run.iterdir() if ".tmp-" in path.name]
            if left:
                raise KillTestError(f"{name}: {left[0]} stays behind")
        print(f"{counted.total()}: {dict(moments)}", file=sys.stderr, flush=True)
    return {"kills": counted.total(), "stages": dict(counted), "moments": dict(moments)}


def main() -> None:
    """Kill, look, run again, and write the JSON."""
    parser = build_parser(__doc__)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if count_threads() > 1:
        raise SystemExit("A library has started a thread, so this process cannot be forked.")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        result = kill_often(arguments.kills, Path(scratch), seed=arguments.seed)
    result |= {"seed": arguments.seed, "seconds": round(time.perf_counter() - start, 1)}
    save_measurement(arguments.output, result)


if __name__ == "__main__":
    main()
