"""The report stage: one HTML page from the JSON files of a run; nothing is computed anew."""

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lpdeploy.artifacts import MANIFEST, atomic_file, load_json
from lpdeploy.benchmark.plot import draw_latency, draw_training
from lpdeploy.models.compact import RECORD
from lpdeploy.plan import describe_method, load_plan

SAMPLES = "samples.json"
_FIX = "Make it again, or delete it."


def save_report(run: Path, *, output: Path | None = None) -> Path:
    """Write the page of a run; a stage that has not run is left out.

    Args:
        run: What ``prune`` wrote, with what later stages added.
        output: HTML file; ``run/report.html`` by default. It needs no other file.

    Returns:
        The file.

    Raises:
        ArtifactError: ``run`` has no plan, or a file in it cannot be read.
    """
    path = output or run / "report.html"
    environment = Environment(
        loader=PackageLoader("lpdeploy.report", "."), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("page.html.j2").render(**collect_report(run))
    with atomic_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def collect_report(run: Path) -> dict[str, Any]:
    """Read what the page shows: plan, sizes, training curve, and each stage's JSON or None."""
    plan = load_plan(run)
    bench = _load(run / "bench.json")
    stages = load_json(run / MANIFEST, fix=_FIX)["stages"]
    return {
        "run": run.name,
        "plan": plan,
        "method": describe_method(stages["prune"]["options"]),
        "base": Path(plan.base_model).name,
        "model": _load(run / "model" / RECORD),
        "training": draw_training(_load_log(run / "log.jsonl")),
        "verify": _load(run / "verify.json"),
        "evaluations": _list_evaluations(run / "eval.json"),
        "bench": bench,
        "latency": draw_latency(bench) if bench else None,
        "samples": _load(run / SAMPLES),
        "stages": stages,
    }


def _load(path: Path) -> Any:
    return load_json(path, fix=_FIX) if path.is_file() else None


def _list_evaluations(path: Path) -> list[dict[str, Any]]:
    """Return one evaluation for each engine and precision, the newest first."""
    newest = _load(path)
    return [newest, *newest.get("others", [])] if newest else []


def _load_log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
