"""Several ratios and criteria, one after the other: prune, compact, evaluate, and compare."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lpdeploy.artifacts import save_json
from lpdeploy.errors import ArtifactError, LpdeployError, OptionError
from lpdeploy.models.record import load_model_record
from lpdeploy.paper.cells import Cell, Study, build_cell, list_eval_words, list_prune_words
from lpdeploy.paper.run import CommandError, Commands, prune_or_resume
from lpdeploy.paper.tables import Row
from lpdeploy.records import find_record
from lpdeploy.report.compare import compare
from lpdeploy.report.comparison import Comparison
from lpdeploy.run_folder import RunFolder

logger = logging.getLogger(__name__)

RECORD, PAGE = "sweep.json", "compare.html"


@dataclass(frozen=True)
class Combination:
    """One run of a sweep.

    Attributes:
        ratio: Share of groups to remove.
        criterion: How they are chosen; None where the options of ``prune`` say it.
        options: All options of ``prune``, the ratio and the seed among them.
    """

    ratio: float
    criterion: str | None
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of its folder: ``lora-0.5``, or ``0.5`` where only ratios differ."""
        return f"{self.criterion}-{self.ratio:g}" if self.criterion else f"{self.ratio:g}"


@dataclass(frozen=True)
class SweepRun:
    """What a run of a sweep is.

    Attributes:
        key: Of the model, the data and all options that shape it.
        measured: What it was evaluated on; None before that.
    """

    key: str
    measured: dict[str, Any] | None = None


@dataclass(frozen=True)
class SweepRecord:
    """What the runs of a sweep are, so that nobody takes one for another: ``sweep.json``.

    Attributes:
        runs: Name of a run's folder -> what it is.
    """

    runs: dict[str, SweepRun]

    def to_json(self) -> dict[str, Any]:
        """Return what the file holds."""
        return asdict(self)


@dataclass(frozen=True)
class SweepResult:
    """What a sweep has led to.

    Attributes:
        comparison: Of the runs that are done; None if they are fewer than two.
        page: The page about it, likewise.
        failed: Name of each run that failed -> why.
    """

    comparison: Comparison | None
    page: Path | None
    failed: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return what the command prints with ``--json``."""
        found = self.comparison.to_json() if self.comparison else {}
        page = None if self.page is None else str(self.page)
        return {**found, "page": page, "failed": dict(self.failed)}


def run_sweep(
    combinations: Iterable[Combination], study: Study, output: Path, *, show_progress: bool = False
) -> SweepResult:
    """Run what is missing of a sweep, and compare the runs that are done.

    Each command is a process of its own. A run that was interrupted goes on; one that failed does
    not stop the others, and is tried again by the next call.

    Args:
        combinations: What to run.
        study: Model, data, options of ``prune`` and what is measured.
        output: Folder of the runs, of ``sweep.json`` and of ``compare.html``.
        show_progress: Show the commands, and the progress of each.

    Raises:
        ArtifactError: ``output`` holds something else, or runs of another model, data or options.
        LpdeployError: Two runs in a row failed with the same error.
    """
    chosen = list(combinations)
    cells = {own.name: _build_cell(own, study) for own in chosen}
    if len(cells) < len(chosen):
        raise OptionError(
            "Two runs of the sweep would have the same name. Give ratios that differ."
        )
    _check_same(_load_record(output), cells, output)
    with RunFolder(output).hold():
        failed = _run_all(cells, study, output, Commands(show=show_progress))
    done = [output / name for name in cells if name not in failed]
    if len(done) < 2:
        return SweepResult(None, None, failed)
    return SweepResult(compare(done, output=output / PAGE), output / PAGE, failed)


def _build_cell(own: Combination, study: Study) -> Cell:
    chosen = {"criterion": own.criterion} if own.criterion else {}
    shared = {name: value for name, value in own.options.items() if name not in ("ratio", "seed")}
    cell = build_cell(
        Row(own.name, own.name, chosen),
        replace(study, prune_options=shared),
        ratio=own.ratio,
        seed=own.options["seed"],
        measured=False,  # what is measured does not make another run
    )
    return replace(cell, evaluation=study.evaluation)


def _load_record(output: Path) -> SweepRecord:
    record = find_record(SweepRecord, output / RECORD, fix="Delete it, and the runs beside it.")
    if record is not None:
        return record
    found = output.iterdir() if output.is_dir() else ()
    present = sorted(path.name for path in found if not path.name.startswith("."))  # our lock
    if present:
        raise ArtifactError(
            f"'{output}' holds {present[0]}, and no {RECORD}. Use an empty or a new `output`, or "
            "one that 'lpdeploy sweep' wrote."
        )
    return SweepRecord({})


def _check_same(record: SweepRecord, cells: Mapping[str, Cell], output: Path) -> None:
    """Refuse to take a run for one that is asked for now and would be another."""
    for name, cell in cells.items():
        if name in record.runs and record.runs[name].key != cell.key:
            raise ArtifactError(
                f"'{output / name}' was made of another model or data, or with other options, than "
                f"are asked for now. Use another `output`, or delete '{output}'."
            )


def _run_all(
    cells: Mapping[str, Cell], study: Study, output: Path, commands: Commands
) -> dict[str, str]:
    """Run what is missing, and return why runs failed."""
    failed: dict[str, str] = {}
    previous = None
    for place, (name, cell) in enumerate(cells.items(), start=1):
        logger.info("%s: run %s of %s", name, place, len(cells))
        try:
            _run(name, cell, study, output, commands)
        except CommandError as error:
            failed[name] = str(error)
            logger.info("%s: failed: %s", name, error)
        if name in failed and failed[name] == previous:
            raise LpdeployError(
                f"Two runs in a row failed with the same error: {previous} Correct that and run "
                "the same command again; finished runs are kept."
            )
        previous = failed.get(name)
    return failed


def _run(name: str, cell: Cell, study: Study, output: Path, commands: Commands) -> None:
    """Do what is missing of a run; each stage is whole or not there."""
    run, wanted = RunFolder(output / name), cell.evaluation.to_json()
    known = _load_record(output).runs.get(name) or SweepRun(cell.key)
    _save_run(output, name, known)
    if not run.is_complete:
        prune_or_resume(list_prune_words(cell, study, run=run.path), run, commands)
    if load_model_record(run.model) is None:
        commands.call(["compact", str(run), "--overwrite"])
    if known.measured != wanted or not run.evaluation.is_file():
        commands.call([*list_eval_words(cell, study, model=str(run)), "--with-base"])
        _save_run(output, name, replace(known, measured=wanted))


def _save_run(output: Path, name: str, run: SweepRun) -> None:
    runs = {**_load_record(output).runs, name: run}
    save_json(output / RECORD, SweepRecord(runs).to_json())
