"""A measured table as Markdown."""

from collections.abc import Sequence

from lpdeploy.machine import Machine
from lpdeploy.paper.results import SCALES, SYMBOLS, ResultRow, TableResult, Value
from lpdeploy.paper.texts import list_text_notes, render_texts

_ARROWS = {"lower": " ↓", "higher": " ↑", "": ""}
_PAPER_UNITS = {
    "WikiText2": "perplexity",
    "PTB": "perplexity",
    "s/iter": "s",
    "peak memory": "bytes",
    "total time": "s",
}


def render_markdown(document: TableResult) -> str:
    """Write a table as Markdown: mean and spread, the best in bold, and the paper's figures."""
    spec, paper = document.spec, _list_paper_columns(document)
    lines = render_texts(document) if spec.kind == "texts" else _render_values(document, paper)
    return "\n".join(
        [
            f"# {spec.heading}: {spec.title}",
            "",
            spec.about,
            "",
            *lines,
            "",
            *_list_notes(document, has_paper=bool(paper)),
        ]
    )


def _render_values(document: TableResult, paper: Sequence[str]) -> list[str]:
    has_masks = document.spec.kind == "similarity"
    header = [
        "pruned",
        _name_rows(document),
        *(f"{_escape(c.name)}{_show_unit(c.unit)}{_ARROWS[c.better]}" for c in document.columns),
        *([] if has_masks else ["parameters"]),
        "seeds",
        *(f"paper: {name}{_show_unit(_PAPER_UNITS.get(name, 'share'))}" for name in paper),
    ]
    lines = [header, ["---"] * len(header)]
    lines += [_render_row(row, document, paper) for row in document.rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _name_rows(document: TableResult) -> str:
    if document.spec.kind == "similarity":
        return "groups"
    return "method" if all(row.place is None for row in document.rows) else "setting"


def _list_paper_columns(document: TableResult) -> list[str]:
    """List the paper's columns: its texts and costs, and the tasks that were measured here."""
    asked = {column.name for column in document.columns} | {"average"}
    found = dict.fromkeys(name for row in document.rows for name in row.paper)
    return [name for name in found if name in _PAPER_UNITS or name in asked]


def _render_row(row: ResultRow, document: TableResult, paper: Sequence[str]) -> list[str]:
    own = [_show_value(row.values.get(c.name), c.unit) for c in document.columns]
    if document.spec.kind != "similarity":
        removed = row.values.get("removed")
        own.append(f"-{removed.mean:.1%}" if removed else "")
    printed = [
        _show_number(row.paper[name], _PAPER_UNITS.get(name, "share")) if name in row.paper else ""
        for name in paper
    ]
    return [f"{row.ratio:.0%}", _escape(row.label), *own, str(row.seeds), *printed]


def _show_value(value: Value | None, unit: str) -> str:
    if value is None:
        return ""
    text = _show_number(value.mean, unit)
    if value.spread is not None:
        text += f" ± {_show_number(value.spread, unit)}"
    if value.best:
        text = f"**{text}**"
    if value.relative is not None:
        text += f" ({value.relative - 1:+.1%})"
    elif value.error is not None:
        text += f" ({_show_number(value.error, unit)})"
    return text


def _show_number(number: float, unit: str) -> str:
    if unit in ("s", "ms"):
        return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"
    return f"{SCALES.get(unit, 1) * number:.{2 if unit else 3}f}"


def _show_unit(unit: str) -> str:
    return f", {SYMBOLS[unit]}" if unit in SYMBOLS else ""


def _escape(text: str) -> str:
    """Write a name so that it does not end its column."""
    return text.replace("|", "\\|")


def _list_notes(document: TableResult, *, has_paper: bool) -> list[str]:
    is_text = document.spec.kind == "texts"
    about = list_text_notes(document) if is_text else _list_value_notes(document)
    if has_paper:
        about.append("The paper's figures are for LLaMA-7B.")
    notes = [" ".join([f"Model {document.model}, data {document.data}.", *about])]
    if document.missing:
        notes.append(f"{document.missing} of {document.cells} cells are missing.")
    for failure in document.failed:
        seed = "" if failure.seed is None else f", seed {failure.seed}"
        notes.append(f"Failed: {failure.row}, {failure.ratio:.0%}{seed}: {failure.error}")
    notes.append(f"`{document.command}`")
    if document.machine:
        notes.append(describe_machine_line(document.machine))
    if document.machines > 1:
        notes.append(f"Cells come from {document.machines} machines or sets of versions.")
    return [*"\n\n".join(notes).split("\n"), ""]


def _list_value_notes(document: TableResult) -> list[str]:
    """Say what stands beside a mean."""
    over = "layers and seeds" if document.spec.kind == "similarity" else "seeds"
    notes = [f"Mean ± sample standard deviation over {over}."]
    if any(c.better for c in document.columns):
        notes.append("The best value of each ratio is bold.")
    if document.spec.kind == "cost":
        notes.append("In brackets: change from the first row.")
    if any(c.name == "average" for c in document.columns):
        notes.append("Accuracies are normalized by length for the tasks for which the paper's are.")
        shown = [v for row in document.rows for v in row.values.values() if v.relative is None]
        if any(value.error is not None for value in shown):
            notes.append("In brackets: the standard error over the documents.")
    return notes


def describe_machine_line(machine: Machine) -> str:
    """Name the machine, the versions and the date of the last cell."""
    versions = ", ".join(
        f"{name} {machine.versions[name]}"
        for name in ("lpdeploy", "torch", "transformers")
        if name in machine.versions
    )
    threads = f", {machine.threads} threads" if machine.threads else ""
    return f"{machine.gpu or machine.cpu}{threads}, {versions}, {machine.date[:10]}."
