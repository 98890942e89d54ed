"""A table of the paper on one's own model: run what is missing, write JSON, Markdown and a plot."""

import logging
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lpdeploy.artifacts import atomic_file, save_json
from lpdeploy.errors import ArtifactError, LpdeployError, OptionError
from lpdeploy.models.find import resolve_model
from lpdeploy.models.loading import compute_model_sha256, load_config
from lpdeploy.paper.cells import (
    Cell,
    EvalSettings,
    Selection,
    Source,
    Study,
    identify_source,
    list_cells,
    name_path,
    show_words,
)
from lpdeploy.paper.document import build_document, list_values
from lpdeploy.paper.plot import draw_document
from lpdeploy.paper.render import render_markdown
from lpdeploy.paper.results import TableResult
from lpdeploy.paper.run import CELLS, CommandError, Commands, check_output, load_cell, run_cells
from lpdeploy.paper.table import Table
from lpdeploy.run_folder import RunFolder

logger = logging.getLogger(__name__)


def build_study(
    model: str,
    *,
    data: str,
    prune_words: Sequence[str],
    prune_options: Mapping[str, Any],
    evaluation: EvalSettings,
) -> Study:
    """Hash model and data, so that cells are only reused for the same ones.

    Raises:
        ArtifactError: The model cannot be loaded.
        LpdeployError: The segments are longer than its positions.
    """
    folder = resolve_model(model)
    positions = load_config(folder).max_position_embeddings
    if evaluation.perplexity and evaluation.seq_len > positions:
        raise LpdeployError(
            f"--eval-seq-len {evaluation.seq_len}: '{model}' has {positions} positions. Use "
            f"--eval-seq-len {positions} or less."
        )
    name = name_path(folder) if Path(model).is_dir() else model
    return Study(
        model=Source(model, name, compute_model_sha256(folder)),
        data=identify_source(data),
        prune_words=tuple(prune_words),
        prune_options=prune_options,
        evaluation=evaluation,
    )


def build_evaluation(
    perplexity: Sequence[str],
    *,
    seq_len: int,
    max_segments: int | None = None,
    tasks: Sequence[str],
    task_data: Path | None,
    limit: int | None = None,
) -> EvalSettings:
    """Identify the texts and tasks that cells are measured on.

    Raises:
        OptionError: Two texts would have the same name in the table.
    """
    texts = tuple(identify_source(given) for given in perplexity)
    names = [text.name for text in texts]
    for name in names:
        if names.count(name) > 1:
            raise OptionError(f"Two of --perplexity are called '{name}'. Rename one of them.")
    folder = identify_source(str(task_data)) if task_data else None
    return EvalSettings(texts, seq_len, tuple(tasks), folder, max_segments, limit)


def adapt_evaluation(table: Table, evaluation: EvalSettings) -> EvalSettings:
    """Return what the cells of a table are measured on, which not every table lets one choose."""
    compared = {"similarity": "masks", "texts": "texts"}.get(table.kind)
    if compared is None:
        return evaluation
    if evaluation:
        logger.info(
            "%s compares only %s; --perplexity and --tasks are ignored.", table.heading, compared
        )
    return EvalSettings(examples=table.kind == "texts")


def run_paper(
    selection: Selection,
    study: Study,
    output: Path,
    *,
    jobs: int = 1,
    render_only: bool = False,
    show_progress: bool = False,
) -> TableResult:
    """Run the missing cells of a table, and write the table after each of them.

    Args:
        selection: Which part of which table.
        study: Model, data and options.
        output: Folder of ``cells/`` and of ``table-7.json``, ``.md`` and ``.svg``. Tables in one
            folder share their cells.
        jobs: Number of cells that run at the same time.
        render_only: Run nothing.
        show_progress: Show the commands, and the progress of each.

    Raises:
        LpdeployError: There is nothing to show, something cannot be used, or all cells fail.
    """
    table = selection.table
    _check_asked(selection, study, jobs=jobs)
    check_output(output)
    cells = list_cells(selection, study)
    cost = table.kind == "cost"
    command = describe_command(selection, study)

    def write(failed: Mapping[str, str]) -> TableResult:
        results = {c.key: r for c in cells if (r := load_cell(output, c, undisturbed=cost))}
        document = build_document(
            selection, study, cells, results, command=command, folder=output, failed=failed
        )
        return _save(output / table.file_stem, document)

    if render_only:
        document = write({})
        if document.missing == document.cells:
            raise ArtifactError(f"'{output}' holds no cell of this table. Leave --render-only out.")
        return document
    with RunFolder(output).hold():
        todo = _list_missing(cells, output, cost=cost)
        failed: dict[str, str] = {}
        commands = Commands(show=show_progress)
        for cell, error in run_cells(todo, study, output, jobs=jobs, fresh=cost, commands=commands):
            if error is not None:
                failed[cell.key] = str(error)
            logger.info(_describe_end(cell, error, output))
            write(failed)
        return write(failed)


def _check_asked(selection: Selection, study: Study, *, jobs: int) -> None:
    table = selection.table
    if table.kind == "quality" and not study.evaluation:
        raise OptionError(
            f"{table.heading} has nothing to show. Give --perplexity SOURCE, --tasks NAMES or both."
        )
    if table.kind == "cost" and jobs > 1:
        raise OptionError(
            f"--jobs {jobs}: {table.heading} measures time and memory, which other cells disturb. "
            "Leave --jobs out."
        )


def _list_missing(cells: Sequence[Cell], output: Path, *, cost: bool) -> list[Cell]:
    """List the cells to run, each key once, since two rows may be the same run."""
    (output / CELLS).mkdir(parents=True, exist_ok=True)
    missing = {c.key: c for c in cells if load_cell(output, c, undisturbed=cost) is None}
    keys = {cell.key for cell in cells}
    done = len(keys) - len(missing)
    logger.info("%s of %s cells are done, %s to run", done, len(keys), len(missing))
    return list(missing.values())


def _describe_end(cell: Cell, error: CommandError | None, output: Path) -> str:
    name = cell.row.label
    if cell.seed is not None:
        # In Figure 4, one run serves all ratios.
        name += f", {cell.ratio:.0%}" if cell.options.get("schedule") != "one-shot" else ""
        name += f", seed {cell.seed}"
    if error is not None:
        return f"{name}: failed: {error}"
    result = load_cell(output, cell)
    values = list_values(result) if result else {}
    shown = [f"{s.name} {values[s.name]:.2f}" for s in cell.evaluation.perplexity]
    shown += [f"average {values['average']:.2%}"] if "average" in values else []
    return f"{name}: {', '.join(shown) or 'done'}"


def _save(stem: Path, document: TableResult) -> TableResult:
    save_json(stem.with_suffix(".json"), document.to_json())
    texts = {".md": render_markdown(document), ".svg": draw_document(document)}
    for suffix, text in texts.items():
        if text is not None:
            with atomic_file(stem.with_suffix(suffix)) as temporary:
                temporary.write_text(text, encoding="utf-8")
    return document


def describe_command(selection: Selection, study: Study) -> str:
    """Write the command that makes a table, with each path cut to its last part."""
    evaluation, table = study.evaluation, selection.table
    words = ["paper", table.name, study.model.name, "--data", study.data.name, "--output", "DIR"]
    if table.kind != "similarity":
        words += show_words(evaluation.list_words(seq_len="--eval-seq-len"))
    words += ["--seeds", str(selection.seeds)]
    words += ["--ratios", ",".join(f"{ratio:g}" for ratio in selection.ratios)]
    if selection.rows != table.rows:
        words += ["--rows", ",".join(row.name for row in selection.rows)]
    words += ["--", *show_words(study.prune_words)] if study.prune_words else []
    return shlex.join(["lpdeploy", *words])
