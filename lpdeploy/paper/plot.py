"""A measured table as a plot."""

from collections.abc import Sequence
from typing import Any

from lpdeploy.paper.results import Column, ResultRow, TableResult
from lpdeploy.plotting import COLORS, INK, make_panels, to_svg

_COST_PANELS = ("s/iter", "scoring", "peak memory")
# Beyond this a linear axis shows only the worst row.
_LOG_ABOVE = 20


def draw_document(document: TableResult) -> str | None:
    """Draw means with their spreads.

    Cost as bars; masks and criteria over the ratio, the unpruned model as a line across; tables
    that vary one number over that number.

    Args:
        document: The table.

    Returns:
        SVG, or None while no row has a value.
    """
    if not any(row.values for row in document.rows):
        return None
    if document.kind == "cost":
        return _draw_cost(document)
    if document.kind == "similarity":
        return _draw_similarity(document)
    columns = [c for c in document.columns if _is_drawn(c)] or document.columns
    columns = [c for c in columns if any(c.name in row.values for row in document.rows)]
    groups = list(dict.fromkeys(row.panel for row in document.rows))
    figure, panels = make_panels(len(groups) * len(columns))
    pairs = [(group, column) for group in groups for column in columns]
    for panel, (group, column) in zip(panels, pairs, strict=True):
        rows = [row for row in document.rows if row.panel == group]
        if rows[0].place is None:
            _draw_over_ratio(panel, rows, column.name)
        else:
            _draw_over_place(panel, rows, column.name)
            panel.set_xlabel(group or document.axis)
        _finish(panel, column, rows)
    _add_legend(figure, panels[-1])
    return to_svg(figure)


def _add_legend(figure: Any, panel: Any) -> None:
    """Put it beside the panels, where it hides no point."""
    handles, labels = panel.get_legend_handles_labels()
    width, height = figure.get_size_inches()
    figure.set_size_inches(width + 2, height)
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)


def _is_drawn(column: Column) -> bool:
    """Draw texts and the average; single tasks would be too many panels."""
    return column.unit == "perplexity" or column.name == "average"


def _finish(panel: Any, column: Column, rows: Sequence[ResultRow]) -> None:
    unit = {"share": ", %", "perplexity": ", perplexity"}.get(column.unit, "")
    panel.set_title(column.name + unit, loc="left", color=INK)
    means = [r.values[column.name].mean for r in rows if column.name in r.values]
    if means and min(means) > 0 and max(means) / min(means) > _LOG_ABOVE:
        panel.set_yscale("log")


def _read(row: ResultRow, name: str, *, scale: float = 1.0) -> tuple[float, float]:
    value = row.values[name]
    return scale * value.mean, scale * (value.spread or 0.0)


def _scale(name: str) -> float:
    return 100.0 if name == "average" else 1.0


def _draw_over_ratio(panel: Any, rows: Sequence[ResultRow], name: str) -> None:
    pruned = list(dict.fromkeys(row.label for row in rows if row.ratio > 0))
    for row in rows:
        if row.ratio == 0 and name in row.values:
            level, _ = _read(row, name, scale=_scale(name))
            panel.axhline(level, color=INK, linestyle=":", linewidth=1, label=row.label)
    for index, label in enumerate(pruned):
        own = [r for r in rows if r.label == label and name in r.values]
        points = [_read(row, name, scale=_scale(name)) for row in own]
        # Beside one another, so that spreads of equal ratios do not hide each other.
        shift = 0.6 * (index - (len(pruned) - 1) / 2)
        _draw_series(panel, [100 * r.ratio + shift for r in own], points, index, label)
    ratios = sorted({100 * row.ratio for row in rows if row.ratio > 0})
    panel.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
    panel.set_xlim(min(ratios, default=0) - 6, max(ratios, default=0) + 6)
    panel.set_xlabel("pruned, %")


def _draw_over_place(panel: Any, rows: Sequence[ResultRow], name: str) -> None:
    # Evenly spaced: 1, 5, 10, 20 as well as 0.9 and 0.99 must not lie on one another.
    places = list(dict.fromkeys(row.place for row in rows))
    for index, ratio in enumerate(dict.fromkeys(row.ratio for row in rows)):
        own = [row for row in rows if row.ratio == ratio and name in row.values]
        points = [_read(row, name, scale=_scale(name)) for row in own]
        xs = [places.index(row.place) for row in own]
        _draw_series(panel, xs, points, index, f"{ratio:.0%} pruned")
    panel.set_xticks(range(len(places)), [f"{place:g}" for place in places])


def _draw_series(
    panel: Any,
    xs: Sequence[float],
    points: Sequence[tuple[float, float]],
    index: int,
    label: str,
    *,
    line: str = "-",
) -> None:
    panel.errorbar(
        xs, [mean for mean, _ in points], yerr=[spread for _, spread in points], label=label,
        color=COLORS[index % len(COLORS)], marker="o", markersize=4, linewidth=1.2, capsize=3,
        linestyle=line,
    )  # fmt: skip


def _draw_cost(document: TableResult) -> str:
    rows = document.rows
    names = [n for n in _COST_PANELS if any(n in row.values for row in rows)]
    names += [c.name for c in document.columns if c.unit == "perplexity"]
    units = {column.name: column.unit for column in document.columns}
    several = len({row.ratio for row in rows}) > 1
    labels = [row.label + (f", {row.ratio:.0%}" if several else "") for row in rows]
    figure, panels = make_panels(len(names))
    for panel, name in zip(panels, names, strict=True):
        scale = 1e-9 if units[name] == "bytes" else 1.0
        measured = [i for i, row in enumerate(rows) if name in row.values]
        points = [_read(rows[i], name, scale=scale) for i in measured]
        bars = panel.barh(
            measured, [mean for mean, _ in points], 0.7, xerr=[spread for _, spread in points],
            color=[COLORS[i % len(COLORS)] for i in measured],
            error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 3},
        )  # fmt: skip
        panel.bar_label(bars, fmt="%.3g", padding=4, color=INK, fontsize=9)
        unit = {"bytes": ", GB", "s": ", s", "ms": ", ms", "perplexity": ", perplexity"}
        panel.set_title(name + unit.get(units[name], ""), loc="left", color=INK)
        panel.set_yticks(range(len(rows)), labels if panel is panels[0] else [""] * len(rows))
        panel.set_ylim(len(rows) - 0.5, -0.5)
        panel.grid(axis="y", visible=False)
        panel.margins(x=0.2)
    return to_svg(figure)


def _draw_similarity(document: TableResult) -> str:
    kinds = list(dict.fromkeys(row.label for row in document.rows))
    figure, panels = make_panels(len(kinds))
    series = (
        ("agreement", 0, "-"),
        ("random agreement", 0, ":"),
        ("Jaccard", 1, "-"),
        ("random Jaccard", 1, ":"),
    )
    for panel, kind in zip(panels, kinds, strict=True):
        rows = [row for row in document.rows if row.label == kind and row.values]
        for name, index, line in series:
            points = [_read(row, name) for row in rows]
            xs = [100 * row.ratio for row in rows]
            _draw_series(panel, xs, points, index, name, line=line)
        panel.set_title(kind, loc="left", color=INK)
        panel.set_xlabel("pruned, %")
        panel.set_ylim(0, 1.05)
    _add_legend(figure, panels[-1])
    return to_svg(figure)
