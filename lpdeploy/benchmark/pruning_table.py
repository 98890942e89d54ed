"""The pruning benchmark as a table, for a terminal and as Markdown (the paper's Tables 4 and 6)."""

from collections.abc import Sequence

from lpdeploy.benchmark.results import PruningResult, PruningRow
from lpdeploy.benchmark.table import describe_origin, format_lines, render_lines

_HEADER = (
    "criterion",
    "s/iter",
    "p10 to p90",
    "against gradient",
    "scoring",
    "cutting, ms",
    "after, s/iter",
    "peak MB",
    "against gradient",
    "beside weights MB",
    "against gradient",
    "planned MB",
    "GFLOP/iter",
)


def name_variant(row: PruningRow) -> str:
    """Say which variant a row is of."""
    name = row.criterion + (f", {row.load_in}" if row.load_in else "")
    return name + (", off-loaded" if row.offload_gradients else "")


def list_cells(rows: Sequence[PruningRow]) -> list[tuple[str, ...]]:
    """Write each row of ``bench-pruning.json`` as the cells of a table, under their header."""
    cells = [
        (
            name_variant(row),
            f"{row.step_ms / 1e3:.3g}",
            f"{row.p10_ms / 1e3:.3g} to {row.p90_ms / 1e3:.3g}",
            _show(row.relative_time),
            f"{row.scoring_ms / row.step_ms:.1%}",
            f"{row.cutting_ms:.0f}",
            f"{row.after_ms / 1e3:.3g}",
            _show_megabytes(row.peak_bytes),
            _show(row.relative_memory),
            _show_megabytes(row.beside_bytes),
            _show(row.relative_beside),
            _show_megabytes(row.planned_bytes),
            f"{row.flops / 1e9:,.0f}",
        )
        for row in rows
    ]
    return [_HEADER, *cells]


def _show(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def _show_megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:,.0f}"


def format_pruning(result: PruningResult) -> str:
    """Write the table for a terminal."""
    return format_lines(list_cells(result.rows))


def render_pruning(result: PruningResult) -> str:
    """Write the table as Markdown, with what it was measured on."""
    table = render_lines(list_cells(result.rows))
    notes = [f"{note}\n" for note in _list_notes(result)]
    return "\n".join(["# What pruning costs", "", *table, "", *_list_totals(result), "", *notes])


def _list_totals(result: PruningResult) -> list[str]:
    lines = ["| criterion | total, s | training, s | scoring, s | cutting, s |", f"|{' --- |' * 5}"]
    for row in result.rows:
        parts = [row.total_s[name] for name in ("training", "scoring", "cutting")]
        values = " | ".join(f"{value:.2f}" for value in (sum(parts), *parts))
        lines.append(f"| {name_variant(row)} | {values} |")
    return lines


def _list_notes(result: PruningResult) -> list[str]:
    work, first = result.workload, result.rows[0]
    order = "in turn, step by step" if work.interleaved else "one after another"
    checkpointing = ", gradient checkpointing" if work.gradient_checkpointing else ""
    how = (
        f"{work.layers} layers, hidden {work.hidden_size}; {work.batch_size} rows of "
        f"{work.seq_len} tokens a step, {work.micro_batch_size} a pass{checkpointing}; "
        f"medians of {first.steps} scored steps of the whole model, then "
        f"{work.ratio:.0%} of the groups removed at once, then steps of what is left; each in "
        f"a process of its own, {order}."
    )
    memory = (
        "Peak: of the device, or on a CPU of the process with its libraries. Beside weights: "
        "without the base and the libraries. The totals are those of all measured steps."
    )
    operations = (
        "GFLOP: matrix products of the batch, forward and backward, attention by half, and the "
        "score of every weight; the head included."
    )
    return [how, memory, operations, describe_origin(result.machine)]
