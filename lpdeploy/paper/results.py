"""A table as it was measured: ``table-7.json``, and ``cells/KEY.json`` of each of its cells."""

from dataclasses import asdict, dataclass
from typing import Any

from lpdeploy.machine import Machine
from lpdeploy.paper.tables import TABLES, Table

SYMBOLS = {"share": "%", "bytes": "GB", "s": "s", "ms": "ms"}
"""Unit of a column -> what a reader sees; a perplexity has no unit."""
SCALES = {"share": 100, "bytes": 1e-9}
"""Unit of a column -> the factor from a value to what a reader sees."""


@dataclass(frozen=True)
class Text:
    """What a model answered.

    Attributes:
        prompt: The instruction.
        text: The answer.
        tokens: Number of its tokens.
        reason: ``stop`` if the model ended it, ``length`` if it was cut.
    """

    prompt: str
    text: str
    tokens: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """A finished cell.

    Attributes:
        key: The key of the cell.
        model: Name and hash of the model.
        data: Name and identity of the data.
        ratio: Share of groups removed.
        seed: None for the unpruned model.
        options: Options of ``prune``.
        evaluation: What it was measured on.
        machine: What it ran on, and when it finished.
        commands: The commands, each path cut to its last part.
        undisturbed: Whether its times can be trusted: nothing ran beside it, and it was not
            interrupted.
        prune: JSON of ``lpdeploy prune``; None for the unpruned model.
        training: Medians over the steps, see ``summarize_log``; None for the unpruned model.
        compact: JSON of ``lpdeploy compact``; None if it did not run.
        eval: JSON of ``lpdeploy eval``; None if it did not run.
        texts: What it answered to ``lpdeploy generate``; None if it was not asked.
    """

    key: str
    model: dict[str, str]
    data: dict[str, str]
    ratio: float
    seed: int | None
    options: dict[str, Any]
    evaluation: dict[str, Any]
    machine: Machine
    commands: tuple[str, ...]
    undisturbed: bool
    prune: dict[str, Any] | None = None
    training: dict[str, float] | None = None
    compact: dict[str, Any] | None = None
    eval: dict[str, Any] | None = None
    texts: tuple[Text, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what the cell's file holds; commands that did not run are left out."""
        data = asdict(self) | {"machine": self.machine.to_json(), "date": self.machine.date}
        optional = ("prune", "training", "compact", "eval", "texts")
        return {k: v for k, v in data.items() if v is not None or k not in optional}


@dataclass(frozen=True)
class Column:
    """A value of every row.

    Attributes:
        name: Its key in a row's values.
        unit: ``perplexity``, ``share``, ``s``, ``ms``, ``bytes`` or empty.
        better: ``lower``, ``higher``, or empty if neither is.
    """

    name: str
    unit: str
    better: str


@dataclass(frozen=True)
class Value:
    """A value of a row over its seeds.

    Attributes:
        mean: The mean.
        spread: Sample standard deviation; None for a single value.
        n: Number of values.
        best: Whether it is the best of its column; None if there is nothing to compare it with.
        relative: ``mean`` divided by that of the first row; None in tables that do not show it.
        error: Of an accuracy, the standard error over the documents of the task, the mean over
            the seeds, which all see the same documents; None for anything else.
    """

    mean: float
    spread: float | None
    n: int
    best: bool | None = None
    relative: float | None = None
    error: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object; ``best``, ``relative`` and ``error`` are left out if None."""
        return {k: v for k, v in asdict(self).items() if v is not None or k == "spread"}


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """A row at one ratio.

    Attributes:
        name: Name of the row, or the kind of groups whose masks are compared.
        label: What a reader sees.
        ratio: Share of groups removed.
        seeds: Number of seeds that were measured.
        values: What was measured, by column.
        paper: The paper's own figures.
        place: Position on the axis of a plot over rows.
        panel: Plot that the row belongs to, if a figure has several.
        cells: Keys of its cells; empty if masks are compared.
        texts: What the model of its cell answered; empty if it was not asked.
    """

    name: str
    label: str
    ratio: float
    seeds: int
    values: dict[str, Value]
    paper: dict[str, float]
    place: float | None = None
    panel: str = ""
    cells: tuple[str, ...] = ()
    texts: tuple[Text, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object; rows of masks have no ``place``, ``panel`` and ``cells``."""
        data = asdict(self) | {"values": {k: v.to_json() for k, v in self.values.items()}}
        unused = [] if self.cells else ["place", "panel", "cells"]
        unused += [] if self.texts else ["texts"]
        return {k: v for k, v in data.items() if k not in unused}


@dataclass(frozen=True)
class Failure:
    """A cell that failed.

    Attributes:
        row: Label of its row.
        ratio: Share of groups to remove.
        seed: None for the unpruned model.
        error: The last line of its command on stderr.
    """

    row: str
    ratio: float
    seed: int | None
    error: str


@dataclass(frozen=True, kw_only=True)
class TableResult:
    """A table of the paper, as far as it has been measured: ``table-7.json``.

    Attributes:
        table: Name of the table.
        model: Name of the model.
        data: Name of the data.
        command: The command that makes the table.
        seeds: Number of seeds per row.
        columns: What is measured of each row.
        rows: The rows, in their order.
        cells: Number of cells in the table.
        missing: Number of cells that have not been measured yet.
        failed: Cells that failed in the last run.
        machines: Number of different machines and sets of versions that the cells come from.
        machine: What the latest cell ran on; None if there is no cell.
    """

    table: str
    model: str
    data: str
    command: str
    seeds: int
    columns: tuple[Column, ...]
    rows: tuple[ResultRow, ...]
    cells: int
    missing: int
    failed: tuple[Failure, ...]
    machines: int
    machine: Machine | None

    @property
    def spec(self) -> Table:
        """The table that was measured."""
        return TABLES[self.table]

    def to_json(self) -> dict[str, Any]:
        """Return what the table's file holds, with the heading and description of the table."""
        names = ("heading", "title", "about", "kind", "axis")
        return {
            "table": self.table,
            **{name: getattr(self.spec, name) for name in names},
            **asdict(self),
            "rows": [row.to_json() for row in self.rows],
            "machine": self.machine.to_json() if self.machine else None,
        }
