"""The bench stage: load what is compared, time it, write bench.json and its plot."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lpdeploy.artifacts import atomic_file, save_json
from lpdeploy.benchmark.latency import Workload, measure_latency
from lpdeploy.benchmark.plot import draw_latency
from lpdeploy.benchmark.variants import load_variants
from lpdeploy.models.loading import resolve_device

BENCH = "bench.json"


def bench_latency(  # noqa: PLR0913 - what the command takes, and two callbacks
    targets: Sequence[str],
    *,
    engines: Sequence[str] = ("torch", "onnx"),
    forms: Sequence[bool] = (True, False),
    workload: Mapping[str, int],
    device: str = "auto",
    output: Path | None = None,
    on_progress: Callable[[int, int], None] = lambda *_: None,
    log: Callable[[str], None] = lambda _: None,
) -> tuple[dict[str, Any], Path]:
    """Time the targets and write ``bench.json`` and ``bench.svg``.

    Args:
        targets: Runs, model folders or hub names.
        engines: ``torch``, ``onnx``.
        forms: Merged (True), unmerged (False), or both.
        workload: Fields of ``Workload``.
        device: ``auto``, ``cpu`` or ``cuda``.
        output: Folder for the files; the first target that is a run, else the working folder.
        on_progress: Is told (repeats done, all repeats).
        log: Is told what takes time before that.

    Returns:
        What ``bench.json`` holds, and its folder.
    """
    with tempfile.TemporaryDirectory(prefix="lpdeploy-bench-") as scratch:
        variants = load_variants(
            targets,
            engines=engines,
            forms=forms,
            device=resolve_device(device),
            scratch=Path(scratch),
            log=log,
        )
        result = measure_latency(variants, Workload(**workload), on_progress=on_progress)
    folder = output or _first_run(targets)
    save_json(folder / BENCH, result)
    with atomic_file(folder / "bench.svg") as temporary:
        temporary.write_text(draw_latency(result), encoding="utf-8")
    return result, folder


def _first_run(targets: Sequence[str]) -> Path:
    runs = [Path(target) for target in targets if (Path(target) / "plan.json").is_file()]
    return runs[0] if runs else Path()
