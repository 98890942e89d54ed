"""The pictures of a page: SVG that takes the colours of the page around it."""

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lpdeploy.plotting import COLORS, GRID, INK, make_panels, quote_text, to_svg
from lpdeploy.report.removed import GroupMap

_DENSE, _PRUNED = "#5b6c8f", "#1f6f8b"
_REACH = 1.5  # powers of ten above and below the mean of a layer that the map's colours tell apart
_LOG_ABOVE = 3  # A larger factor between the worst and the best would hide what is between them.
# A scatter's panel, a line and a character of its labels, in points of print.
_PANEL, _LINE, _CHARACTER = np.array([290.0, 200.0]), 11, 5.0
_DARK_CELL = 0.55  # of the scale, below which a cell is dark and its cross is light


@dataclass(frozen=True)
class Picture:
    """A picture in a page.

    Attributes:
        title: What stands above it.
        svg: The picture, ready for a page.
    """

    title: str
    svg: str


@dataclass(frozen=True)
class Point:
    """A dot of a scatter.

    Attributes:
        x: Where it is.
        y: Likewise.
        label: What stands beside it.
        strong: Whether it is one of those that the picture is about.
        area: Of the dot, in square points.
    """

    x: float
    y: float
    label: str
    strong: bool = True
    area: float = 40.0


def embed(svg: str, *, title: str, label: str, name: str) -> Picture:
    """Make a drawn picture a part of a page.

    Its ink, grid and series become variables of the page, so that it can be read in the light and
    in the dark, and its ids get a prefix, since a page holds many pictures.

    Args:
        svg: What ``to_svg`` wrote.
        title: What stands above it.
        label: What a screen reader says of it.
        name: Of the picture, once in the page; the prefix of its ids.
    """
    svg = svg[svg.index("<svg") :]
    variables = {INK: "--ink", "#000000": "--ink", GRID: "--line", "#ffffff": "--page"}
    variables |= {color: f"--series-{index}" for index, color in enumerate(COLORS)}
    for color, variable in variables.items():
        svg = re.sub(rf'{color}(?=[;"])', f"var({variable})", svg)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'((?:xlink:)?href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    spoken = html.escape(label, quote=True)
    return Picture(title, svg.replace("<svg ", f'<svg role="img" aria-label="{spoken}" ', 1))


def draw_scatter(points: Sequence[Point], *, x: str, y: str, line: Sequence[Point] = ()) -> str:
    """Draw points with their labels, and a line through those of a front.

    Args:
        points: The points.
        x: Name of the axis.
        y: Likewise.
        line: Points of the front, in their order along ``x``.

    Returns:
        SVG.
    """
    figure, (panel,) = make_panels(1, height=3.6)
    if line:
        panel.plot([p.x for p in line], [p.y for p in line], color=INK, linewidth=0.8, zorder=1)
    for point in sorted(points, key=lambda point: -point.area):  # the small ones in front
        color = _PRUNED if point.strong else _DENSE
        panel.scatter([point.x], [point.y], s=point.area, color=color, alpha=0.85, zorder=2)
    panel.set_xlim(left=0, right=1.1 * max(point.x for point in points))
    panel.margins(y=0.18)
    if max(point.y for point in points) > _LOG_ABOVE * min(point.y for point in points) > 0:
        _use_log_scale(panel)
    _place_labels(panel, points)
    panel.set_xlabel(x, color=INK)
    panel.set_ylabel(quote_text(y), color=INK)
    panel.grid(axis="x", color=GRID, linewidth=0.8)
    return to_svg(figure)


def _use_log_scale(panel: Any) -> None:
    """Keep one bad point from pressing all others together; plain numbers on the axis."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(ScalarFormatter())
    panel.yaxis.set_minor_formatter(NullFormatter())


def _place_labels(panel: Any, points: Sequence[Point]) -> None:
    """Write each label beside its dot, higher where it would meet one that is there already."""
    taken: list[tuple[float, float, float]] = []
    for point in sorted(points, key=lambda point: (point.y, point.x)):
        place = (panel.transScale + panel.transLimits).transform((point.x, point.y))
        across, up = place * _PANEL  # points of print from the lower left corner
        width = _CHARACTER * len(point.label)
        is_left = across + width > _PANEL[0]
        start, lift = across - width if is_left else across, 3
        while any(
            start < end and begin < start + width and abs(up + lift - height) < _LINE
            for begin, end, height in taken
        ):
            lift += _LINE
        taken.append((start, start + width, up + lift))
        panel.annotate(
            quote_text(point.label), (point.x, point.y), xytext=(-7 if is_left else 7, lift),
            textcoords="offset points", ha="right" if is_left else "left", color=INK, fontsize=8.5,
        )  # fmt: skip


def draw_map(groups: GroupMap) -> str:
    """Draw importance as colour, a row a layer, with a cross on what was removed.

    Args:
        groups: What to draw.

    Returns:
        SVG. Its cells are one small image, whatever their number.
    """
    import matplotlib as mpl

    layers, cells = groups.removed.shape
    figure, (panel,) = make_panels(1, height=1.1 + max(1.2, 0.16 * min(layers, 40)))
    with np.errstate(divide="ignore"):
        shown = np.clip(np.log10(groups.importance), -_REACH, _REACH)
    shown[list(groups.dropped)] = np.nan
    colors = mpl.colormaps["cividis"].with_extremes(bad="#6b6b6b")
    image = panel.imshow(
        np.ma.masked_invalid(shown), cmap=colors, vmin=-_REACH, vmax=_REACH, aspect="auto",
        interpolation="none",
    )  # fmt: skip
    _cross_out(panel, groups, shown)
    panel.grid(visible=False)
    panel.set_ylabel("layer", color=INK)
    panel.set_xlabel(_name_columns(groups), color=INK)
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.yaxis.get_major_locator().set_params(integer=True)
    if cells != groups.groups or groups.is_sorted:
        panel.set_xticks([])
    if groups.is_scored:
        _add_scale(figure, image, panel)
    return to_svg(figure)


def _name_columns(groups: GroupMap) -> str:
    if groups.is_sorted and groups.is_scored:
        return f"{groups.what}, the least important first"
    return groups.what


def _cross_out(panel: Any, groups: GroupMap, shown: np.ndarray) -> None:
    """Put a cross on each cell of which most groups went; whole layers get a word instead."""
    dropped = set(groups.dropped)
    layers, cells = np.nonzero(groups.removed > 0.5)
    own = [(cell, layer) for layer, cell in zip(layers, cells, strict=True) if layer not in dropped]
    size = 18 if groups.removed.shape[1] <= 40 and groups.removed.shape[0] <= 16 else 6
    for is_dark, color in ((True, "#fffffe"), (False, "#000001")):  # no colour of the page
        marks = [
            (cell, layer) for cell, layer in own
            if (np.nan_to_num(shown[layer, cell], nan=_REACH) < (2 * _DARK_CELL - 1) * _REACH)
            == is_dark
        ]  # fmt: skip
        if marks:
            xs, ys = zip(*marks, strict=True)
            panel.scatter(xs, ys, marker="x", s=size, linewidths=0.9, color=color)
    for layer in groups.dropped:
        middle = (groups.removed.shape[1] - 1) / 2
        panel.text(middle, layer, "dropped", color="#fffffe", fontsize=7, ha="center", va="center")


def _add_scale(figure: Any, image: Any, panel: Any) -> None:
    bar = figure.colorbar(image, ax=panel, fraction=0.05, pad=0.02)
    bar.set_ticks([-1, 0, 1], labels=["a tenth", "the mean", "ten times"])
    bar.ax.tick_params(colors=INK, labelsize=8)
    bar.outline.set_visible(False)


def describe_map(groups: GroupMap) -> str:
    """Say in a sentence what a map shows, for those who cannot see it."""
    layers, gone = len(groups.kept), len(groups.dropped)
    left = [count for count in groups.kept if count]
    each = f"{min(left)}" if min(left) == max(left) else f"{min(left)} to {max(left)}"
    dropped = f" {gone} of them {'was' if gone == 1 else 'were'} dropped." if gone else ""
    return (
        f"Map of {layers} layers by their {groups.groups} {groups.what}.{dropped} "
        f"{'Each of the others' if gone else 'Each'} keeps {each}."
    )


def embed_all(drawn: dict[str, str], *, name: str, describe: Callable[[str], str]) -> list[Picture]:
    """Make several drawn pictures a part of a page; ``describe`` turns a title into a label."""
    return [
        embed(svg, title=title, label=describe(title), name=f"{name}-{place}")
        for place, (title, svg) in enumerate(drawn.items())
    ]
