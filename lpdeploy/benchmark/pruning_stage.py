"""The stage of `bench pruning`: start what is compared, let it step, write JSON, table and plot."""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from lpdeploy.artifacts import atomic_file, save_json
from lpdeploy.benchmark.plot import draw_pruning
from lpdeploy.benchmark.pruning import WARM_UPS, PruningWorkload, build_result, run_interleaved
from lpdeploy.benchmark.pruning_table import render_pruning
from lpdeploy.benchmark.pruning_worker import Prepared, PruningVariant, StepCost, start_pruning
from lpdeploy.benchmark.results import PruningResult
from lpdeploy.config import PruneConfig
from lpdeploy.criteria import CRITERIA
from lpdeploy.models.find import resolve_model
from lpdeploy.models.loading import load_config, resolve_device
from lpdeploy.models.quantized import check_load_in
from lpdeploy.pruning.fit import measure_free_bytes, plan_run

logger = logging.getLogger(__name__)

BENCH = "bench-pruning.json"

Progress = Callable[[int, int], None]


def bench_pruning(
    model: str,
    workload: PruningWorkload,
    *,
    criteria: Sequence[str],
    load_in: Sequence[str] = (),
    data: str | None = None,
    output: Path,
    on_progress: Progress = lambda *_: None,
) -> PruningResult:
    """Measure what a step costs by criterion, and write JSON, Markdown and SVG.

    Each variant is a run in a process of its own. Where all of them fit into memory at once, they
    take their steps in turn; else each takes all of its steps before the next one starts.

    Args:
        model: Folder or hub name; a folder with a config alone gives random weights.
        workload: Batches, and how many steps.
        criteria: What to compare. On a GPU, one that needs the gradients of the weights is also
            measured with them off-loaded.
        load_in: Also measure the default criterion over a base in ``8bit``.
        data: Data source; None for random tokens.
        output: Folder for the files.
        on_progress: Is told (steps done, all steps).

    Raises:
        LpdeployError: Model, data, device or memory are not what is needed.
    """
    folder = _find_folder(model)
    config = load_config(folder)
    device = resolve_device(workload.options.device)
    options = _list_options(workload, criteria, load_in, device=device)
    variants = [PruningVariant(folder, own, data) for own in options]
    together = _fit_together(config, options, device)
    order = "in turn step by step" if together else "one after another"
    logger.info("%s runs, %s", len(variants), order)
    measured = _measure(variants, workload, together=together, on_progress=on_progress)
    result = build_result(
        config,
        workload,
        [(own, *one) for own, one in zip(options, measured, strict=True)],
        interleaved=together,
    )
    save_json(output / BENCH, result.to_json())
    texts = {"bench-pruning.md": render_pruning(result), "bench-pruning.svg": draw_pruning(result)}
    for name, text in texts.items():
        with atomic_file(output / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return result


def _find_folder(model: str) -> Path:
    folder = Path(model)
    if folder.is_dir() and (folder / "config.json").is_file():
        return folder.resolve()  # weights or none: random ones cost the same
    return resolve_model(model)


def _list_options(
    workload: PruningWorkload,
    criteria: Sequence[str],
    load_in: Sequence[str],
    *,
    device: str,
) -> list[PruneConfig]:
    changes: list[dict[str, Any]] = [{"criterion": name} for name in criteria]
    for name in criteria:
        if not CRITERIA[name].weight_gradients:
            continue
        if device == "cpu":
            logger.info("%s off-loaded is left out: on a CPU it is the same as without.", name)
        else:
            changes.append({"criterion": name, "offload_gradients": True})
    for kind in load_in:
        check_load_in(kind)
        changes.append({"criterion": PruneConfig.criterion, "load_in": kind})
    return [workload.build_options(**change) for change in changes]


def _fit_together(config: PretrainedConfig, options: Sequence[PruneConfig], device: str) -> bool:
    """Tell whether all runs may be alive at once; only one of them is in a step."""
    plans = [plan_run(config, own) for own in options]
    free = measure_free_bytes(device)
    largest = max(plan.total for plan in plans)
    # While it waits a run holds its libraries, its weights and LoRA.
    waiting = sum(plan.process + plan.weights + plan.adapters for plan in plans)
    return waiting + largest < 0.8 * free


def _measure(
    variants: Sequence[PruningVariant],
    workload: PruningWorkload,
    *,
    together: bool,
    on_progress: Progress,
) -> list[tuple[Prepared, list[StepCost]]]:
    """Return (prepared, costs) of each variant."""
    rounds = WARM_UPS + workload.steps + workload.steps_after
    batches = [variants] if together else [[variant] for variant in variants]
    total, done = rounds * len(batches), 0

    def advance() -> None:
        nonlocal done
        done += 1
        on_progress(done, total)

    measured = []
    for batch in batches:
        with ExitStack() as stack:
            workers = [stack.enter_context(start_pruning(variant)) for variant in batch]
            costs = run_interleaved(workers, rounds, advance)
        measured += [(worker.described, own) for worker, own in zip(workers, costs, strict=True)]
    return measured
