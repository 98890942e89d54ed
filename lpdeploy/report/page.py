"""The report stage: one HTML page from the files of a run; nothing is computed anew."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpdeploy.benchmark.plot import count_gone, draw_latency_panels, draw_training, name_models
from lpdeploy.benchmark.results import LatencyResult, LatencyRow
from lpdeploy.generation.samples import Sample
from lpdeploy.pruning.log import StepInfo, load_log
from lpdeploy.pruning.target import TargetRecord
from lpdeploy.records import find_record
from lpdeploy.report.facts import FIX, Facts, load_facts
from lpdeploy.report.forms import Form, Text, choose_text
from lpdeploy.report.origin import name_source, trace_origin
from lpdeploy.report.plot import (
    Picture,
    Point,
    describe_map,
    draw_map,
    draw_scatter,
    embed,
    embed_all,
)
from lpdeploy.report.removed import GroupMap, build_maps, load_importance
from lpdeploy.report.rendering import check_page, save_page
from lpdeploy.report.rounding import list_roundings
from lpdeploy.report.verdict import judge, list_unsteady
from lpdeploy.run_folder import RunFolder, check_output


@dataclass(frozen=True)
class SampleTable:
    """What several models wrote after the same prompts.

    Attributes:
        models: The models, a column each.
        rows: Each prompt with the text of every model; None where a model was not asked.
    """

    models: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str | None, ...]], ...]


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
    check_page(path)
    with run.hold(shared=True):
        values = _collect(run)
    save_page(path, "page.html.j2", values)
    return path


def _collect(run: RunFolder) -> dict[str, Any]:
    """Read what the page shows: what each stage found, or None, and its pictures."""
    facts = load_facts(run)
    log = load_log(run)
    return {
        "facts": facts,
        "base": name_source(facts.plan.base_model),
        "verdict": judge(facts),
        "texts": list(dict.fromkeys(text for form in facts.forms for text in form.perplexity)),
        "scatter": _draw_forms(facts.forms),
        "maps": _draw_maps(facts),
        "training": _draw_training(log),
        "events": [i for i in log if i.loss_before is not None and i.loss_after is not None],
        "target": find_record(TargetRecord, run.target, fix=FIX),
        "latency": _draw_latency(facts.bench),
        "timed": _name_rows(facts.bench),
        "unsteady": list_unsteady(facts.bench.rows if facts.bench else ()),
        "roundings": list_roundings(facts.forms, facts.verification),
        "samples": _arrange_samples(find_record(list[Sample], run.samples, fix=FIX) or []),
        "origin": trace_origin(facts),
    }


def _draw_forms(forms: Sequence[Form]) -> Picture | None:
    """Draw quality against size, if there is more than one form to compare."""
    text = choose_text(forms)
    if text is None:
        return None
    shown = [
        form
        for form in forms
        if text in form.perplexity
        and form.bytes
        and math.isfinite(form.perplexity[text].perplexity)
    ]
    if len(shown) < 2:
        return None
    slowest = max((_get_time(form) or 0 for form in shown), default=0) or 1
    points = [_place(form, text, slowest) for form in shown]
    svg = draw_scatter(points, x="MB of weights", y=f"perplexity on {text.name}")
    spoken = "; ".join(f"{p.label}: {p.x:.1f} MB, perplexity {p.y:.2f}" for p in points)
    title = f"Perplexity on {text.name} against MB of weights; lower and further left is better"
    return embed(svg, title=title, label=f"{title}. {spoken}.", name="forms")


def _place(form: Form, text: Text, slowest: float) -> Point:
    time = _get_time(form)
    label = form.name if time is None else f"{form.name}: {time:.3g} ms"
    area = 30.0 if time is None else 30 + 130 * time / slowest
    return Point((form.bytes or 0) / 1e6, form.perplexity[text].perplexity, label,
                 strong=form.pruned, area=area)  # fmt: skip


def _get_time(form: Form) -> float | None:
    """Return the time of a decoded token where it was measured, else of a prefill."""
    row = form.times.get("decode") or form.times.get("prefill")
    return row.median_ms if row else None


def _draw_maps(facts: Facts) -> list[tuple[GroupMap, Picture]]:
    maps = build_maps(facts.plan, load_importance(facts.run.importance))
    return [
        (
            groups,
            embed(
                draw_map(groups),
                title=f"Layers by {groups.what}",
                label=describe_map(groups),
                name=f"map-{place}",
            ),
        )
        for place, groups in enumerate(maps)
    ]


def _draw_training(log: Sequence[StepInfo]) -> list[Picture]:
    if not log:
        return []
    first, last = log[0], log[-1]
    spoken = (
        f"{len(log)} entries from step {first.step} to {last.step}; loss from {first.loss:.3f} to "
        f"{last.loss:.3f}; {100 * count_gone(last):.0f} % of the groups removed in the end"
    )
    return embed_all(
        draw_training(log), name="training", describe=lambda title: f"{title}: {spoken}."
    )


def _draw_latency(bench: LatencyResult | None) -> list[Picture]:
    if bench is None:
        return []
    return embed_all(
        draw_latency_panels(bench),
        name="latency",
        describe=lambda title: f"Bars: {title}. The table below has the figures.",
    )


def _name_rows(bench: LatencyResult | None) -> list[tuple[LatencyRow, str]]:
    return list(zip(bench.rows, name_models(bench.rows), strict=True)) if bench else []


def _arrange_samples(samples: Sequence[Sample]) -> SampleTable:
    models = tuple(dict.fromkeys(sample.model for sample in samples))
    texts = {(sample.opening, sample.model): sample.text for sample in samples}
    openings = dict.fromkeys(sample.opening for sample in samples)
    rows = tuple(
        (opening, tuple(texts.get((opening, model)) for model in models)) for opening in openings
    )
    return SampleTable(models, rows)
