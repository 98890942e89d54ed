"""Panels of one look, and their SVG text."""

import io
from typing import Any

INK, GRID = "#333333", "#dddddd"
COLORS = ("#1f6f8b", "#e08e45", "#7a9e3f", "#a4508b", "#b23a48", "#5b6c8f", "#8d6e4f")
"""For series, in their order; they differ in lightness, too."""


def make_panels(count: int, *, rows: int = 1) -> tuple[Any, list[Any]]:
    """Return a figure and ``count`` panels of it, side by side in ``rows`` of equal length."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "lpdeploy"  # the same figures give the same file
    mpl.rcParams["svg.fonttype"] = "none"
    columns = -(-count // rows)
    figure = Figure(figsize=(4.6 * columns, 3.2 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)[:count]
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color=GRID, linewidth=0.8)
        panel.set_axisbelow(True)
        panel.tick_params(colors=INK)
    return figure, panels


def to_svg(figure: Any) -> str:
    """Return a figure as SVG, without a date."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()
