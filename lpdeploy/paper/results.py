"""A table as it was measured: ``table-7.json``, and ``cells/KEY.json`` of each of its cells."""

from dataclasses import asdict, dataclass
from typing import Any

from lpdeploy.machine import Machine


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
        machine: What it ran on.
        date: When it finished.
        commands: The commands, each path cut to its last part.
        undisturbed: Whether its times can be trusted: nothing ran beside it, and it was not
            interrupted.
        prune: JSON of ``lpdeploy prune``; None for the unpruned model.
        training: Medians over the steps, see ``summarise_log``, likewise.
        compact: JSON of ``lpdeploy compact``; None where it did not run.
        eval: JSON of ``lpdeploy eval``; None where it did not run.
    """

    key: str
    model: dict[str, str]
    data: dict[str, str]
    ratio: float
    seed: int | None
    options: dict[str, Any]
    evaluation: dict[str, Any]
    machine: Machine
    date: str
    commands: tuple[str, ...]
    undisturbed: bool
    prune: dict[str, Any] | None = None
    training: dict[str, float] | None = None
    compact: dict[str, Any] | None = None
    eval: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what the cell's file holds; without commands that did not run."""
        data = asdict(self) | {"commands": list(self.commands), "machine": self.machine.to_json()}
        optional = ("prune", "training", "compact", "eval")
        return {k: v for k, v in data.items() if v is not None or k not in optional}


@dataclass(frozen=True)
class Column:
    """A value of every row.

    Attributes:
        name: Its key in a row's values.
        unit: ``perplexity``, ``share`` (shown in percent), ``s``, ``ms``, ``bytes`` or empty.
        better: ``lower``, ``higher``, or empty where neither is.
    """

    name: str
    unit: str
    better: str


@dataclass(frozen=True)
class Value:
    """A value of a row over its seeds.

    Attributes:
        mean: The mean.
        spread: Sample standard deviation; None of a single value.
        n: Number of values.
        best: Whether it is the best of its column; None where nothing can be compared.
        relative: ``mean`` over that of the first row; None in tables that do not show it.
    """

    mean: float
    spread: float | None
    n: int
    best: bool | None = None
    relative: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object; without ``best`` and ``relative`` where they are None."""
        data = asdict(self)
        return {k: v for k, v in data.items() if v is not None or k == "spread"}


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """A row at one ratio.

    Attributes:
        name: Name of the row, or of the kind of groups whose masks are compared.
        label: What a reader sees.
        ratio: Share of groups removed.
        seeds: How many seeds are in it.
        values: What was measured, by column.
        paper: The paper's own figures.
        place: Where it stands on the axis of a plot over rows.
        panel: Which plot it belongs to, where a figure has several.
        cells: Keys of its cells; empty for masks that are compared.
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

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object; rows of masks have no ``place``, ``panel`` and ``cells``."""
        values = {name: value.to_json() for name, value in self.values.items()}
        data = asdict(self) | {"values": values, "cells": list(self.cells)}
        unused = () if self.cells else ("place", "panel", "cells")
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
    """A table of the paper as it was measured so far: ``table-7.json``.

    Attributes:
        table: Name of the table; see ``Table`` for heading, title, about, kind and axis.
        model: Name of the model.
        data: Name of the data.
        command: The command that makes the table.
        seeds: Seeds of each row.
        columns: What is measured of each row.
        rows: The rows, in their order.
        cells: How many cells the table has.
        missing: How many of them are not there yet.
        failed: Cells that failed in the last run.
        machines: How many machines or sets of versions the cells come from.
        machine: What the latest cell ran on; None without any.
    """

    table: str
    heading: str
    title: str
    about: str
    kind: str
    axis: str
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

    def to_json(self) -> dict[str, Any]:
        """Return what the table's file holds."""
        return {
            **asdict(self),
            "columns": [asdict(column) for column in self.columns],
            "rows": [row.to_json() for row in self.rows],
            "failed": [asdict(failure) for failure in self.failed],
            "machine": self.machine.to_json() if self.machine else None,
        }
