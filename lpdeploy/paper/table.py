"""What a table or figure of the paper is: rows, ratios, and what is measured of each."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lpdeploy.paper.figures import FIGURES


@dataclass(frozen=True)
class Row:
    """One row of a table: what it is called, and the options of ``prune`` that make it.

    Attributes:
        name: What ``--rows`` takes.
        label: What a reader sees.
        options: Options of ``prune`` that this row sets, besides the ratio and the seed.
        step_factor: Multiplies the steps that the user gives; None leaves them unchanged.
        dense: Whether the row is the unpruned model.
        place: Position on the axis of a plot over rows.
        panel: Plot that the row belongs to, if a figure has several.
    """

    name: str
    label: str
    options: Mapping[str, Any] = field(default_factory=dict)
    step_factor: float | None = None
    dense: bool = False
    place: float | None = None
    panel: str = ""


@dataclass(frozen=True)
class Table:
    """A table or figure of the paper.

    Attributes:
        name: ``2`` or ``figure-4``.
        title: One line.
        about: What the paper measured, and what differs here.
        rows: The rows, in the order in which they run and are shown.
        ratios: Default shares of groups to remove.
        kind: ``quality`` (perplexity, tasks), ``cost`` (time and memory, relative to the first
            row), ``similarity`` (masks of two rows) or ``texts`` (what the models write).
        axis: Meaning of a row's ``place``, for plots over rows.
    """

    name: str
    title: str
    about: str
    rows: tuple[Row, ...]
    ratios: tuple[float, ...]
    kind: str = "quality"
    axis: str = ""

    @property
    def file_stem(self) -> str:
        """``table-7``, ``figure-4`` or ``ramps``."""
        return f"table-{self.name}" if self.name.isdigit() else self.name

    @property
    def heading(self) -> str:
        """``Table 7``, ``Figure 4`` or ``Ramps``."""
        return self.file_stem.replace("-", " ").capitalize()

    @property
    def own_options(self) -> set[str]:
        """Options of ``prune`` that some row sets."""
        return {name for row in self.rows for name in row.options}

    def get_paper(self, ratio: float, row: str) -> Mapping[str, float]:
        """Return the paper's own figures of a cell; empty if it has none."""
        return FIGURES.get(self.name, {}).get(ratio, {}).get(row, {})
