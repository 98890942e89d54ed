"""The report stage: one HTML page from the JSON files of a run; nothing is computed anew."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lpdeploy.artifacts import atomic_file
from lpdeploy.benchmark.plot import draw_latency, draw_training
from lpdeploy.benchmark.results import LatencyResult
from lpdeploy.engines import list_exporting
from lpdeploy.engines.exports import find_export
from lpdeploy.engines.verification import VerifyResult
from lpdeploy.errors import ArtifactError
from lpdeploy.evaluation.results import Evaluation, load_evaluation
from lpdeploy.folders import recorded_files
from lpdeploy.manifest import load_stages
from lpdeploy.models.place import locate_model
from lpdeploy.models.record import ModelRecord, load_model_record
from lpdeploy.plan import describe_method
from lpdeploy.pruning.log import StepInfo, load_log
from lpdeploy.pruning.target import TargetRecord
from lpdeploy.records import find_record
from lpdeploy.run_folder import RunFolder, check_output

_FIX = "Make it again, or delete it."
_GENERATOR = '<meta name="generator" content="lpdeploy">'


@dataclass(frozen=True)
class Sample:
    """What a model wrote, in a list in ``samples.json``.

    Attributes:
        model: What the model is called on the page.
        opening: The prompt.
        text: What followed.
    """

    model: str
    opening: str
    text: str


def save_report(run: str | os.PathLike[str], *, output: Path | None = None) -> Path:
    """Write the page of a run; a stage that has not run is left out.

    Args:
        run: The folder that ``prune`` wrote, with what later stages added.
        output: HTML file; ``RUN/report.html`` by default. It needs no other file.

    Returns:
        The file.

    Raises:
        ArtifactError: The run has no plan, a file in it has changed or cannot be read, its exports
            or figures are of another model, or ``output`` is a file that lpdeploy did not write.
    """
    run = RunFolder(run)
    path = output or run.page
    check_output(path, default=run.page, inputs=())
    _check_page(path)
    environment = Environment(
        loader=PackageLoader("lpdeploy.report", "."), autoescape=True, undefined=StrictUndefined
    )
    with run.hold(shared=True):
        page = environment.get_template("page.html.j2").render(**_collect(run))
    with recorded_files(path.parent, path), atomic_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _check_page(path: Path) -> None:
    """Refuse to replace what is not a page of ours."""
    if not path.exists():
        return
    with path.open("rb") as stream:
        head = stream.read(1024)
    if _GENERATOR.encode() not in head:
        raise ArtifactError(
            f"'{path}' is not a page that lpdeploy wrote, so it is not replaced. Use another "
            "`output`."
        )


def _collect(run: RunFolder) -> dict[str, Any]:
    """Read what the page shows: plan, sizes, training curve, and each stage's JSON or None."""
    plan = run.load_plan()
    run.check_files()
    record = load_model_record(run.model)
    _check_exports(run)
    bench = find_record(LatencyResult, run.benchmark, fix=_FIX)
    stages, log = load_stages(run.path), load_log(run)
    pruned = stages["prune"].options if "prune" in stages else {}
    return {
        "run": run.path.name,
        "plan": plan,
        "method": describe_method(pruned),
        "base": Path(plan.base_model).name,
        "model": record,
        "training": _draw_training(log),
        "target": find_record(TargetRecord, run.target, fix=_FIX),
        "events": [i for i in log if i.loss_before is not None and i.loss_after is not None],
        "verify": find_record(VerifyResult, run.verification, fix=_FIX),
        "evaluations": _list_evaluations(run, record),
        "bench": bench,
        "latency": draw_latency(bench) if bench else None,
        "samples": _load_samples(run.samples),
        "stages": stages,
    }


def _check_exports(run: RunFolder) -> None:
    """Refuse a run in which an export is of another model: its figures would mislead."""
    for unmerged in (False, True):
        if run.get_model(unmerged=unmerged).is_dir():
            place = locate_model(run, unmerged=unmerged)
            for engine in list_exporting():
                find_export(place, engine.name)


def _load_samples(path: Path) -> list[Sample]:
    return find_record(list[Sample], path, fix=_FIX) or []


def _draw_training(log: list[StepInfo]) -> str | None:
    if not log:
        return None
    return draw_training(
        [info.step for info in log],
        losses=[info.loss for info in log],
        ratios=[info.ratio for info in log],
    )


def _list_evaluations(run: RunFolder, record: ModelRecord | None) -> list[Evaluation]:
    """Return one evaluation for each engine and precision, the newest first."""
    newest = load_evaluation(run.evaluation, fix=_FIX)
    if newest and record and newest.model_sha256 != record.sha256:
        raise ArtifactError(
            f"'{run.evaluation}' was measured on another model than '{run.model}' is now. "
            f"Run 'lpdeploy eval {run}' again, or delete the file."
        )
    return [newest, *newest.others] if newest else []
