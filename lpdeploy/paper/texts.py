"""What the models of a table answered, side by side, as Markdown."""

import html
import re

from lpdeploy.paper.results import ResultRow, TableResult

_MARKS = re.compile(r"([\\`*_\[\]|~#])")
_CUT = " …"


def render_texts(document: TableResult) -> list[str]:
    """Write a line of a table for each instruction, and a column for each model."""
    header = ["instruction", *(_name_model(row) for row in document.rows)]
    lines = [header, ["---"] * len(header)]
    lines.append(["parameters", *(_show_removed(row) for row in document.rows)])
    prompts = dict.fromkeys(text.prompt for row in document.rows for text in row.texts)
    for prompt in prompts:
        answers = [_show_answer(row, prompt) for row in document.rows]
        lines.append([write_cell(prompt), *answers])
    return [f"| {' | '.join(line)} |" for line in lines]


def _name_model(row: ResultRow) -> str:
    return write_cell(f"{row.label}, {row.ratio:.0%}" if row.ratio else row.label)


def _show_removed(row: ResultRow) -> str:
    removed = row.values.get("removed")
    return f"-{removed.mean:.1%}" if removed else ""


def _show_answer(row: ResultRow, prompt: str) -> str:
    said = next((text for text in row.texts if text.prompt == prompt), None)
    if said is None:
        return ""
    return write_cell(said.text.strip()) + (_CUT if said.reason == "length" else "")


def list_text_notes(document: TableResult) -> list[str]:
    """Say how the models were asked, and what a cut answer looks like."""
    cut = {t.tokens for row in document.rows for t in row.texts if t.reason == "length"}
    notes = ["Greedy answers, as 'lpdeploy generate --examples' asks for them."]
    if cut:
        longest = f"{max(cut)} tokens" if len(cut) == 1 else f"{min(cut)} to {max(cut)} tokens"
        notes.append(f"An answer that ends with … was cut after {longest}.")
    return notes


def write_cell(text: str) -> str:
    """Write a text so that a cell of a Markdown table shows it as it is, with its lines."""
    lines = _MARKS.sub(r"\\\1", html.escape(text, quote=False)).splitlines()
    indents = [len(line) - len(line.lstrip(" ")) for line in lines]
    return "<br>".join(
        "&nbsp;" * indent + line.lstrip(" ") for indent, line in zip(indents, lines, strict=True)
    )
