"""Panels of one look, and their SVG text."""

import io
from typing import Any

INK, GRID = "#333333", "#dddddd"
COLORS = ("#1f6f8b", "#e08e45", "#7a9e3f", "#a4508b", "#b23a48", "#5b6c8f", "#8d6e4f")
"""For series, in their order; they differ in lightness, too."""


def make_panels(count: int, *, rows: int = 1, height: float = 3.2) -> tuple[Any, list[Any]]:
    """Return a figure and ``count`` panels of it, side by side in ``rows`` of equal length.

    Args:
        count: Number of panels.
        rows: Number of rows that share them.
        height: Of a panel, in inches; its width is 4.6.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "lpdeploy"  # the same figures give the same file
    mpl.rcParams["svg.fonttype"] = "none"
    columns = -(-count // rows)
    figure = Figure(figsize=(4.6 * columns, height * rows), layout="constrained")
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


def quote_text(text: str) -> str:
    """Make any text one that matplotlib shows as it is.

    It would read what stands between two ``$`` as a formula, and it takes no half of a surrogate
    pair, which stands for a byte of a file's name that is no text.
    """
    return text.encode(errors="replace").decode().replace("$", r"\$")
