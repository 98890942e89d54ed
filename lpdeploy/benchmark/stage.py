"""The bench stage: start what is compared, time it, write bench.json, its table and its plot."""

import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lpdeploy.artifacts import atomic_file
from lpdeploy.benchmark.latency import Probe, Subject, measure_latency
from lpdeploy.benchmark.plot import draw_latency
from lpdeploy.benchmark.results import LatencyResult
from lpdeploy.benchmark.table import render_latency
from lpdeploy.benchmark.variants import Variant, list_variants
from lpdeploy.benchmark.worker import Worker, Workload, build_probe, load_all
from lpdeploy.engines import get_engine
from lpdeploy.errors import ArtifactError
from lpdeploy.folders import recorded_files
from lpdeploy.models.loading import resolve_device
from lpdeploy.records import format_json, load_json
from lpdeploy.run_folder import RunFolder, check_output


def bench_latency(  # noqa: PLR0913 - what the command takes
    models: Sequence[str],
    *,
    engines: Sequence[str] = ("torch", "onnx"),
    forms: Sequence[bool] = (True, False),
    workloads: Sequence[Workload],
    device: str = "auto",
    base: Path | None = None,
    output: Path | None = None,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> tuple[LatencyResult, Path]:
    """Time the models and write ``bench.json``, ``bench.md`` and ``bench.svg``.

    Each engine has a process of its own, and one more measures what the machine can do.

    Args:
        models: Runs, model folders or hub names.
        engines: Of ``ENGINES``, with a precision behind a colon where it matters: ``ort:int4``.
        forms: Merged (True), unmerged (False), or both.
        workloads: What to time.
        device: ``auto``, ``cpu`` or ``cuda``.
        base: Where the base model of the runs lies now, if it was moved.
        output: Folder for the files; the first model that is a run, else the working folder.
        on_progress: Is told (repeats done, all repeats).

    Returns:
        The result, and the folder of the files.
    """
    device = resolve_device(device)
    result_file = _choose_file(models, output)
    for engine in engines:
        get_engine(engine.partition(":")[0]).check(device)
    with tempfile.TemporaryDirectory(prefix="lpdeploy-bench-") as scratch:
        variants = list_variants(
            models,
            engines=engines,
            forms=forms,
            device=device,
            scratch=Path(scratch),
            base=base,
            limits={
                "max_batch": max(workload.batch for workload in workloads),
                "max_seq_len": max(2, *(work.tokens + work.decode for work in workloads)),
            },
        )
        with start_workers(variants, device=device) as (subjects, probe):
            result = measure_latency(subjects, workloads, probe=probe, on_progress=on_progress)
    save_latency(result, result_file)
    return result, result_file.parent


def save_latency(result: LatencyResult, file: Path) -> None:
    """Write a result, and its table and its plot beside it."""
    texts = {
        file: format_json(result.to_json()),
        file.with_suffix(".md"): render_latency(result),
        file.with_suffix(".svg"): draw_latency(result),
    }
    with recorded_files(file.parent, *texts):
        for path, text in texts.items():
            with atomic_file(path) as temporary:
                temporary.write_text(text, encoding="utf-8")


@contextmanager
def start_workers(
    variants: Sequence[Variant], *, device: str
) -> Iterator[tuple[list[Subject], Probe]]:
    """Load every engine's variants in a process of its own; end them all on the way out."""
    with ExitStack() as stack:
        subjects = []
        for engine in dict.fromkeys(variant.engine for variant in variants):
            chosen = [variant for variant in variants if variant.engine == engine]
            worker = stack.enter_context(Worker(functools.partial(load_all, chosen)))
            for index, (variant, loaded) in enumerate(zip(chosen, worker.described, strict=True)):
                time = functools.partial(worker.time, index)
                subjects.append(Subject(variant, loaded, time))
        precision = subjects[0].loaded.precision
        limits = stack.enter_context(Worker(functools.partial(build_probe, device, precision)))
        yield subjects, Probe(limits.described, functools.partial(limits.time, 0))


def _choose_file(models: Sequence[str], output: Path | None) -> Path:
    """Return where the result goes: the first run, or a folder; refuse to replace other files."""
    runs = [RunFolder(model) for model in models if RunFolder(model).is_complete]
    if output is None and runs:
        return runs[0].benchmark
    file = RunFolder(output or Path()).benchmark
    if file.exists() and "lpdeploy" not in str(load_json(file, fix="Move it away.")):
        raise ArtifactError(
            f"'{file}' is not a result of lpdeploy, so it is not replaced. Use another `output`."
        )
    check_output(file.parent, inputs=())
    return file
