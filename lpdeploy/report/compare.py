"""The compare stage: runs of one model in a table and, if it is wanted, on a page."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

from lpdeploy.benchmark.table import format_lines
from lpdeploy.report.comparison import Comparison, Contender, Work, build_comparison
from lpdeploy.report.facts import load_facts
from lpdeploy.report.forms import Text
from lpdeploy.report.plot import Picture, Point, draw_scatter, embed
from lpdeploy.report.rendering import check_page, save_page
from lpdeploy.run_folder import RunFolder, check_output

_SHARES = ("parameters", "heads", "channels", "layers")


def compare(runs: Sequence[str | os.PathLike[str]], *, output: Path | None = None) -> Comparison:
    """Put runs of one model side by side; what was not measured of a run is left out.

    Args:
        runs: Folders that ``prune`` wrote, two or more.
        output: HTML file to write the comparison to as well; it needs no other file.

    Returns:
        The comparison.

    Raises:
        ArtifactError: A folder is no run or has changed, the runs are of different models or were
            measured on different texts or questions, or ``output`` is a file that lpdeploy did not
            write.
        ValueError: There are fewer than two runs, or one is given twice.
    """
    folders = [RunFolder(run) for run in runs]
    check_runs(folders)
    if output is not None:
        check_output(output, inputs=())
        check_page(output)
    known = []
    for run in folders:
        with run.hold(shared=True):
            known.append((str(run), load_facts(run)))
    result = build_comparison(known)
    if output is not None:
        _save(result, output)
    return result


def check_runs(runs: Sequence[str | os.PathLike[str]]) -> None:
    """Check that there are several runs, and each of them once.

    Raises:
        ValueError: There are not.
    """
    if len(runs) < 2:
        raise ValueError("a comparison needs two runs or more; give another one")
    places = [Path(run).resolve() for run in runs]
    for run, place in zip(runs, places, strict=True):
        if places.count(place) > 1:
            raise ValueError(f"'{run}' is given twice; give each run once")


def format_comparison(found: Comparison) -> str:
    """Write a comparison for a terminal: a column for each run, since there are more figures."""
    columns, rows = list_table(found)
    turned = [list(line) for line in zip(columns, *rows, strict=True)]
    return "\n".join([format_lines(turned), *list_notes(found)])


def list_table(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return the columns that are not empty, and a row of cells for each contender."""
    columns, rows = name_columns(found), [list_cells(found, own) for own in found.contenders]
    kept = [c for c, cells in enumerate(zip(*rows, strict=True)) if any(cells)]
    return [columns[c] for c in kept], [[row[c] for c in kept] for row in rows]


def name_columns(found: Comparison) -> list[str]:
    """Name the columns of the table."""
    return [
        *("run", "verdict", "best for its", "parameters", "MB"),
        *(f"perplexity on {text.name}" for text in found.texts),
        *("accuracy", *(f"{work.name}, ms" for work in found.works)),
        *(f"{share} removed" for share in _SHARES),
        *("criterion", "schedule"),
    ]


def list_cells(found: Comparison, own: Contender) -> list[str]:
    """Write a row of the table; empty where something was not measured."""
    index = found.contenders.index(own)
    fronts = {"size": found.size_front, "speed": found.time_front}
    return [
        own.name,
        own.verdict or "",
        ", ".join(name for name, front in fronts.items() if index in front),
        "" if own.parameters is None else f"{own.parameters:,}",
        "" if own.bytes is None else f"{own.bytes / 1e6:.2f}",
        *(_write_perplexity(own, text) for text in found.texts),
        "" if own.accuracy is None else f"{100 * own.accuracy:.1f} %",
        *(_write_time(own, work) for work in found.works),
        *(_write_share(own, share) for share in _SHARES),
        own.criterion or "",
        own.schedule or "",
    ]


def _write_perplexity(own: Contender, text: Text) -> str:
    return f"{own.perplexity[text]:.2f}" if text in own.perplexity else ""


def _write_time(own: Contender, work: Work) -> str:
    row = own.times.get(work)
    if row is None:
        return ""
    share = "" if row.relative is None else f" ({row.relative - 1:+.0%})"
    return f"{row.median_ms:.4g}{share}"


def _write_share(own: Contender, share: str) -> str:
    return f"{100 * own.removed[share]:.1f} %" if own.removed.get(share) else ""


def list_notes(found: Comparison) -> list[str]:
    """Say what the marks of the table mean."""
    if found.measure is None:
        return ["Nothing was measured that the runs could be compared by. Run 'lpdeploy eval'."]
    quality = (
        f"perplexity on {found.measure.name}" if isinstance(found.measure, Text) else "accuracy"
    )
    best = "Best for its size, or speed: no other that is as small, or as fast, is better in"
    notes = [f"{best} {quality}."]
    if found.work is not None:
        notes.append(
            f"Speed is that of {found.work.name}, over the dense model's in the same benchmark."
        )
    machines = list(dict.fromkeys(work.machine for work in found.works))
    if len(machines) > 1:
        notes.append(f"Times are of different machines: {'; '.join(machines)}.")
    return notes


def _save(found: Comparison, path: Path) -> None:
    columns, rows = list_table(found)
    fronts = {*found.size_front, *found.time_front}
    values = {
        "found": found,
        "pictures": [picture for picture in (_draw_size(found), _draw_time(found)) if picture],
        "columns": columns,
        "rows": [(index in fronts, row) for index, row in enumerate(rows)],
        "best": [own.name for i, own in enumerate(found.contenders) if i in fronts and own.run],
        "notes": list_notes(found),
    }
    save_page(path, "compare.html.j2", values)


def _draw_size(found: Comparison) -> Picture | None:
    points = {
        index: (own.bytes / 1e6, quality)
        for index, own in enumerate(found.contenders)
        if own.bytes is not None and (quality := found.get_quality(own)) is not None
    }
    return _draw_front(found, points, found.size_front, x="MB of weights", name="size")


def _draw_time(found: Comparison) -> Picture | None:
    if found.work is None:
        return None
    points = {}
    for index, own in enumerate(found.contenders):
        row, quality = own.times.get(found.work), found.get_quality(own)
        if row is not None and row.relative is not None and quality is not None:
            points[index] = (row.relative, quality)
    x = f"time of {found.work.phase} over the dense model's"
    return _draw_front(found, points, found.time_front, x=x, name="time")


def _draw_front(
    found: Comparison,
    points: dict[int, tuple[float, float]],
    front: Sequence[int],
    *,
    x: str,
    name: str,
) -> Picture | None:
    """Draw quality over a cost, with a line through what no other beats."""
    points = {index: point for index, point in points.items() if all(map(math.isfinite, point))}
    if len(points) < 2:
        return None
    text = found.measure
    y = f"perplexity on {text.name}" if isinstance(text, Text) else "share of wrong answers"
    drawn = {
        index: Point(*point, found.contenders[index].name, strong=index in front)
        for index, point in points.items()
    }
    svg = draw_scatter(list(drawn.values()), x=x, y=y, line=[drawn[index] for index in front])
    spoken = "; ".join(f"{p.label}: {p.x:.3g}, {p.y:.3g}" for p in drawn.values())
    title = f"{y.capitalize()} against {x}; the line joins what no other beats"
    return embed(svg, title=title, label=f"{title}. {spoken}.", name=name)
