"""The latency benchmark as a table, for a terminal and as Markdown."""

from collections.abc import Sequence

from lpdeploy.benchmark.results import LatencyResult, LatencyRow
from lpdeploy.machine import Machine

_HEADER = (
    "engine",
    "phase",
    "batch",
    "pruned",
    "LoRA",
    "median ms",
    "p10 to p90",
    "tokens/s",
    "against dense",
    "of the limit",
    "peak MB",
    "parameters",
)


def list_cells(rows: Sequence[LatencyRow]) -> list[tuple[str, ...]]:
    """Write each row of ``bench.json`` as the cells of a table, under their header."""
    cells = [
        (
            f"{row.engine} {row.precision}",
            row.phase,
            str(row.batch),
            f"{row.ratio:.0%}",
            "merged" if row.merged else "unmerged",
            f"{row.median_ms:.2f}",
            f"{row.p10_ms:.2f} to {row.p90_ms:.2f}",
            f"{row.tokens_per_s:,.0f}",
            format_relative(row),
            "" if row.limit_share is None else f"{row.limit_share:.0%}",
            "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.0f}",
            f"{row.parameters:,}",
        )
        for row in rows
    ]
    return [_HEADER, *cells]


def format_relative(row: LatencyRow) -> str:
    """Write how much more time a row takes than the merged dense model: -20.0%."""
    return "" if row.relative is None else f"{row.relative - 1:+.1%}"


def format_lines(lines: Sequence[Sequence[str]]) -> str:
    """Write a header and rows for a terminal, their columns aligned on the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def render_lines(lines: Sequence[Sequence[str]]) -> list[str]:
    """Write a header and rows as the lines of a Markdown table."""
    header, *rows = (f"| {' | '.join(line)} |" for line in lines)
    return [header, f"|{' --- |' * len(lines[0])}", *rows]


def describe_origin(machine: Machine) -> str:
    """Say on what, with which versions, when and by which command something was measured."""
    versions = ", ".join(f"{name} {number}" for name, number in machine.versions.items())
    return (
        f"{machine.gpu or machine.cpu}, {machine.threads} threads, {versions}, "
        f"{machine.date[:10]}: `{machine.command}`"
    )


def format_latency(result: LatencyResult) -> str:
    """Write the table for a terminal."""
    return format_lines(list_cells(result.rows))


def render_latency(result: LatencyResult) -> str:
    """Write the table as Markdown, with what it was measured on."""
    table = render_lines(list_cells(result.rows))
    return "\n".join(["# Latency", "", *table, "", *(f"{note}\n" for note in _list_notes(result))])


def _list_notes(result: LatencyResult) -> list[str]:
    first = result.rows[0]
    rates = result.limits
    reached = []
    if flops := rates.get("flops_per_s"):
        reached.append(f"{flops / 1e9:,.0f} GFLOP/s in a product of large matrices")
    if copied := rates.get("bytes_per_s"):
        what = "which writes what decoding only reads"
        reached.append(f"{copied / 1e9:,.1f} GB/s in a copy, {what}")
    how = (
        f"Prompts of {first.tokens} tokens; medians of {first.repeats} interleaved trials, "
        "each engine in a process of its own. Against dense: the merged dense model on the same "
        "engine and in the same precision."
    )
    limit = (
        "Of the limit: operations of a prefill, bytes of a decoded token, a second, over what the "
        f"machine reached in between ({', '.join(reached)})."
    )
    memory = (
        "Peak: the memory that loading a model and running it took. The first model of an engine "
        "also carries what the engine sets up once."
    )
    own = [result.note] if result.note else []
    return [*own, how, limit, memory, describe_origin(result.machine)]
