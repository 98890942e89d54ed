"""From cells to the JSON of a table: means and spreads over seeds, the best, the paper's."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lpdeploy.evaluation.results import PAPER_METRICS, Figures
from lpdeploy.paper.cells import Cell, Selection, Study
from lpdeploy.paper.results import CellResult, Column, Failure, ResultRow, TableResult, Value
from lpdeploy.paper.run import CELLS
from lpdeploy.paper.similarity import compute_mask_similarity
from lpdeploy.paper.tables import Table

_KINDS = {"heads": "attention (heads)", "channels": "FFN (channels)"}
_COST_COLUMNS = (
    Column("s/iter", "s", "lower"),
    Column("scoring", "ms", "lower"),
    Column("scoring share", "share", "lower"),
    Column("peak memory", "bytes", "lower"),
    Column("total time", "s", "lower"),
)
_SIMILARITY_COLUMNS = (
    Column("agreement", "share", ""),
    Column("random agreement", "share", ""),
    Column("Jaccard", "", ""),
    Column("random Jaccard", "", ""),
)


def list_columns(table: Table, study: Study) -> list[Column]:
    """List what is measured of each row."""
    if table.kind == "similarity":
        return list(_SIMILARITY_COLUMNS)
    columns = list(_COST_COLUMNS) if table.kind == "cost" else []
    evaluation = study.evaluation
    columns += [Column(source.name, "perplexity", "lower") for source in evaluation.perplexity]
    if evaluation.tasks:
        columns += [Column(name, "share", "higher") for name in (*evaluation.tasks, "average")]
    return columns


def list_values(result: CellResult) -> dict[str, float]:
    """List everything that a finished cell measured, by column."""
    values: dict[str, float] = {}
    if result.prune:
        values["removed"] = result.prune["achieved"]["parameters"]
        values["peak memory"] = result.prune["peak_bytes"]
        values["total time"] = result.prune["seconds"]
    training = result.training or {}
    if "step_seconds" in training:
        values["s/iter"] = training["step_seconds"]
        values["scoring"] = 1000 * training["scoring_seconds"]
        values["scoring share"] = training["scoring_share"]
    measured = result.eval or {}
    for name, text in measured.get("perplexity", {}).items():
        values[name] = text["perplexity"]
    for name, task in measured.get("tasks", {}).items():
        value = task.get(PAPER_METRICS.get(name, "acc"))
        if value is not None:
            values[name] = value
    if measured.get("average") is not None:
        values["average"] = measured["average"]
    return values


def list_errors(result: CellResult) -> dict[str, float]:
    """List the standard errors of the accuracies of a finished cell, by column."""
    return Figures(tasks=(result.eval or {}).get("tasks", {})).errors


def build_document(
    selection: Selection,
    study: Study,
    cells: Sequence[Cell],
    results: Mapping[str, CellResult],
    *,
    command: str,
    folder: Path,
    failed: Mapping[str, str],
) -> TableResult:
    """Put the finished cells into a table.

    ``results`` and ``failed`` have the key of a finished or failed cell -> its result or error.
    Figure 4 reads its scores from ``folder``, the output folder.
    """
    table = selection.table
    if table.kind == "similarity":
        rows = _build_similarity_rows(selection, cells, results, folder=folder)
    else:
        rows = _build_rows(selection, cells, results)
    keys = {cell.key for cell in cells}  # two rows may be the same run
    columns = list_columns(table, study)
    _mark_best(rows, columns)
    if table.kind == "cost":
        _relate(rows, selection.rows[0].name)
    used = [result.machine for result in results.values()]
    return TableResult(
        table=table.name,
        model=study.model.name,
        data=study.data.name,
        command=command,
        seeds=selection.seeds,
        columns=tuple(columns),
        rows=tuple(rows),
        cells=len(keys),
        missing=len(keys) - len(results),
        failed=tuple(
            Failure(cell.row.label, cell.ratio, cell.seed, failed[cell.key])
            for cell in cells
            if cell.key in failed
        ),
        machines=len({str((machine.cpu, machine.gpu, machine.versions)) for machine in used}),
        machine=max(used, key=lambda machine: machine.date, default=None),
    )


def _build_rows(
    selection: Selection, cells: Sequence[Cell], results: Mapping[str, CellResult]
) -> list[ResultRow]:
    rows = []
    for ratio in dict.fromkeys(cell.ratio for cell in cells):
        for row in selection.rows:
            own = [cell for cell in cells if cell.row is row and cell.ratio == ratio]
            if not own:
                continue
            finished = [results[cell.key] for cell in own if cell.key in results]
            values = summarize([list_values(result) for result in finished])
            for name, error in summarize([list_errors(result) for result in finished]).items():
                values[name] = replace(values[name], error=error.mean)
            rows.append(
                ResultRow(
                    name=row.name,
                    label=row.label,
                    ratio=ratio,
                    place=row.place,
                    panel=row.panel,
                    seeds=len(finished),
                    values=values,
                    paper=dict(selection.table.get_paper(ratio, row.name)),
                    cells=tuple(cell.key for cell in own),
                    texts=finished[0].texts or () if finished else (),
                )
            )
    return rows


def summarize(done: Sequence[Mapping[str, float]]) -> dict[str, Value]:
    """Return mean and sample standard deviation of each column, over cells or layers."""
    columns: dict[str, list[float]] = {}
    for name, value in (item for values in done for item in values.items()):
        columns.setdefault(name, []).append(value)
    return {
        name: Value(
            mean=statistics.fmean(values),
            spread=statistics.stdev(values) if len(values) > 1 else None,
            n=len(values),
        )
        for name, values in columns.items()
    }


def _mark_best(rows: Sequence[ResultRow], columns: Sequence[Column]) -> None:
    """Mark the best mean of each column among the rows of one ratio and panel."""
    groups: dict[tuple[float, str], list[ResultRow]] = {}
    for row in rows:
        groups.setdefault((row.ratio, row.panel), []).append(row)
    for family in groups.values():
        for column in columns:
            found = [row.values for row in family if column.name in row.values]
            if column.better and len(found) > 1:
                choose = min if column.better == "lower" else max
                best = choose(values[column.name].mean for values in found)
                for values in found:
                    value = values[column.name]
                    values[column.name] = replace(value, best=value.mean == best)


def _relate(rows: Sequence[ResultRow], first: str) -> None:
    """Divide each value by that of the first row at the same ratio."""
    for row in rows:
        base = next(r for r in rows if r.name == first and r.ratio == row.ratio)
        for name, value in row.values.items():
            if name in base.values and base.values[name].mean:
                row.values[name] = replace(value, relative=value.mean / base.values[name].mean)


def _build_similarity_rows(
    selection: Selection,
    cells: Sequence[Cell],
    results: Mapping[str, CellResult],
    *,
    folder: Path,
) -> list[ResultRow]:
    from safetensors.torch import load_file

    pairs = []
    for seed in range(selection.seeds):
        own = [cell for cell in cells if cell.seed == seed and cell.key in results]
        if len(own) == 2:
            paths = [folder / CELLS / f"{cell.key}.importance.safetensors" for cell in own]
            pairs.append([load_file(path) for path in paths])

    def compare(kind: str, ratio: float) -> dict[str, Value]:
        """Summarize over layers and seeds; a layer that loses no group is left out."""
        return summarize(
            [
                compute_mask_similarity(first[name], second[name], ratio=ratio)
                for first, second in pairs
                for name in first
                if name.endswith(kind)
            ]
        )

    return [
        ResultRow(
            name=kind,
            label=label,
            ratio=ratio,
            seeds=len(pairs),
            values=compare(kind, ratio),
            paper={},
        )
        for ratio in selection.ratios
        for kind, label in _KINDS.items()
    ]
