"""A measured table as a plot."""

from collections.abc import Sequence
from typing import Any

from lpdeploy.paper.results import SCALES, SYMBOLS, Column, ResultRow, TableResult
from lpdeploy.plotting import COLORS, INK, make_panels, to_svg

_COST_PANELS = ("s/iter", "scoring", "peak memory")
# If the values differ by more than this factor, a linear axis shows only the worst row.
_LOG_ABOVE = 20


def draw_document(document: TableResult) -> str | None:
    """Draw means with their spreads as SVG; return None if nothing has been measured.

    Costs are bars. Masks and criteria are drawn over the ratio, with a horizontal line for the
    unpruned model. A table that varies one number is drawn over that number.
    """
    columns = [c for c in document.columns if any(c.name in row.values for row in document.rows)]
    if not columns:
        return None
    if document.spec.kind == "cost":
        return _draw_cost(document, columns)
    if document.spec.kind == "similarity":
        return _draw_similarity(document)
    # Single tasks would be too many panels, unless there is nothing else.
    columns = [c for c in columns if c.unit == "perplexity" or c.name == "average"] or columns
    groups = list(dict.fromkeys(row.panel for row in document.rows))
    figure, panels = make_panels(len(groups) * len(columns))
    pairs = [(group, column) for group in groups for column in columns]
    for panel, (group, column) in zip(panels, pairs, strict=True):
        rows = [row for row in document.rows if row.panel == group]
        if rows[0].place is None:
            _draw_over_ratio(panel, rows, column)
        else:
            _draw_over_place(panel, rows, column)
            panel.set_xlabel(group or document.spec.axis)
        _set_title(panel, column)
        means = [row.values[column.name].mean for row in rows if column.name in row.values]
        if means and min(means) > 0 and max(means) / min(means) > _LOG_ABOVE:
            panel.set_yscale("log")
    _add_legend(figure, panels[-1])
    return to_svg(figure)


def _add_legend(figure: Any, panel: Any) -> None:
    """Add a legend beside the panels, where it hides no point."""
    handles, labels = panel.get_legend_handles_labels()
    width, height = figure.get_size_inches()
    figure.set_size_inches(width + 2, height)
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)


def _set_title(panel: Any, column: Column) -> None:
    symbol = SYMBOLS.get(column.unit, column.unit)
    panel.set_title(f"{column.name}, {symbol}", loc="left", color=INK)


def _read(row: ResultRow, column: Column) -> tuple[float, float]:
    value, scale = row.values[column.name], SCALES.get(column.unit, 1)
    return scale * value.mean, scale * (value.spread or 0.0)


def _draw_over_ratio(panel: Any, rows: Sequence[ResultRow], column: Column) -> None:
    pruned = list(dict.fromkeys(row.label for row in rows if row.ratio > 0))
    for row in rows:
        if row.ratio == 0 and column.name in row.values:
            level, _ = _read(row, column)
            panel.axhline(level, color=INK, linestyle=":", linewidth=1, label=row.label)
    for index, label in enumerate(pruned):
        own = [row for row in rows if row.label == label and column.name in row.values]
        points = [_read(row, column) for row in own]
        # Side by side, so that spreads at the same ratio do not hide each other.
        shift = 0.6 * (index - (len(pruned) - 1) / 2)
        _draw_series(panel, [100 * r.ratio + shift for r in own], points, index, label)
    ratios = sorted({100 * row.ratio for row in rows if row.ratio > 0})
    panel.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
    panel.set_xlim(min(ratios, default=0) - 6, max(ratios, default=0) + 6)
    panel.set_xlabel("pruned, %")


def _draw_over_place(panel: Any, rows: Sequence[ResultRow], column: Column) -> None:
    # Evenly spaced, so that neither 1 and 5 nor 0.9 and 0.99 overlap.
    places = list(dict.fromkeys(row.place for row in rows))
    for index, ratio in enumerate(dict.fromkeys(row.ratio for row in rows)):
        own = [row for row in rows if row.ratio == ratio and column.name in row.values]
        points = [_read(row, column) for row in own]
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


def _draw_cost(document: TableResult, columns: Sequence[Column]) -> str:
    rows = document.rows
    columns = [c for c in columns if c.name in _COST_PANELS or c.unit == "perplexity"]
    several = len({row.ratio for row in rows}) > 1
    labels = [row.label + (f", {row.ratio:.0%}" if several else "") for row in rows]
    figure, panels = make_panels(len(columns))
    for panel, column in zip(panels, columns, strict=True):
        measured = [i for i, row in enumerate(rows) if column.name in row.values]
        points = [_read(rows[i], column) for i in measured]
        bars = panel.barh(
            measured, [mean for mean, _ in points], 0.7, xerr=[spread for _, spread in points],
            color=[COLORS[i % len(COLORS)] for i in measured],
            error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 3},
        )  # fmt: skip
        panel.bar_label(bars, fmt="%.3g", padding=4, color=INK, fontsize=9)
        _set_title(panel, column)
        panel.set_yticks(range(len(rows)), labels if panel is panels[0] else [""] * len(rows))
        panel.set_ylim(len(rows) - 0.5, -0.5)
        panel.grid(axis="y", visible=False)
        panel.margins(x=0.2)
    return to_svg(figure)


def _draw_similarity(document: TableResult) -> str:
    kinds = list(dict.fromkeys(row.label for row in document.rows))
    figure, panels = make_panels(len(kinds))
    for panel, kind in zip(panels, kinds, strict=True):
        rows = [row for row in document.rows if row.label == kind and row.values]
        for place, column in enumerate(document.columns):
            color, random = divmod(place, 2)  # each index is followed by that of random masks
            values = [row.values[column.name] for row in rows]
            points = [(value.mean, value.spread or 0.0) for value in values]
            xs = [100 * row.ratio for row in rows]
            _draw_series(panel, xs, points, color, column.name, line=":" if random else "-")
        panel.set_title(kind, loc="left", color=INK)
        panel.set_xlabel("pruned, %")
        panel.set_ylim(0, 1.05)
    _add_legend(figure, panels[-1])
    return to_svg(figure)
