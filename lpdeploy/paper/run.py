"""Run cells: each command is a separate process, and each result is a file that is kept.

A cell that fails does not stop the others, and is tried again with the next run of the table. If
two consecutive cells of different rows fail with the same error, the table stops: all cells are
likely to share the cause.
"""

import functools
import logging
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from lpdeploy.artifacts import save_json
from lpdeploy.errors import INTERRUPTED, ArtifactError, LpdeployError
from lpdeploy.machine import describe_machine
from lpdeploy.paper.cells import (
    Cell,
    Study,
    list_eval_words,
    list_generate_words,
    list_prune_words,
    show_command,
)
from lpdeploy.paper.results import CellResult, Text
from lpdeploy.pruning.log import load_log
from lpdeploy.records import load_record, parse_json
from lpdeploy.run_folder import RunFolder

logger = logging.getLogger(__name__)

CELLS, WORK = "cells", "work"
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_TAIL_BYTES = 1 << 14


class CommandError(LpdeployError):
    """A command of a cell that failed or was stopped.

    Attributes:
        killed: Whether it was stopped from outside, so that the cell can resume.
    """

    def __init__(self, message: str, *, killed: bool) -> None:
        super().__init__(message)
        self.killed = killed


@dataclass
class Commands:
    """Runs lpdeploy commands as processes, and can stop them.

    Attributes:
        show: Whether to name each command and to copy its stderr to ours: progress bars on a
            terminal, else a line a minute.
    """

    show: bool = False
    _live: set[subprocess.Popen[bytes]] = field(default_factory=set)
    _stopped: bool = False

    def call(self, words: Sequence[str]) -> Any:
        """Run one command and return the JSON on the last line of its stdout.

        Raises:
            CommandError: It failed or was stopped. The message is its last line on stderr.
        """
        if self._stopped:
            raise CommandError("stopped", killed=True)
        on_terminal = self.show and sys.stderr.isatty()
        # rich draws no bars into a pipe unless it is told that they end up on a terminal.
        environment = {**os.environ, **({"FORCE_COLOR": "1"} if on_terminal else {})}
        if self.show:
            logger.info("%s", show_command(words))
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(  # noqa: S603 - our own command
                [sys.executable, "-m", "lpdeploy", *words, "--json"],
                stdout=output,
                stderr=subprocess.PIPE,
                env=environment,
                # Ctrl-C in a terminal is for this process, which then ends the other.
                process_group=0,
            )
            self._live.add(process)
            try:
                last = self._finish(process)
                code = process.wait()
            except BaseException:
                process.terminate()
                process.wait()
                if on_terminal:  # an interrupted progress bar leaves the cursor hidden
                    sys.stderr.write("\x1b[?25h")
                raise
            finally:
                self._live.discard(process)
                if process.stderr is not None:
                    process.stderr.close()
            if code:
                killed = code < 0 or code == INTERRUPTED
                raise CommandError(last or f"exit code {code}", killed=killed)
            output.seek(0)
            return parse_json(output.read().splitlines()[-1])

    def _finish(self, process: subprocess.Popen[bytes]) -> str:
        """Read to the end; where this is interrupted, let a run end with a checkpoint."""
        try:
            return self._read_stderr(process)
        except KeyboardInterrupt:
            process.terminate()
            self._read_stderr(process)  # a second interrupt ends it at once
            raise

    def _read_stderr(self, process: subprocess.Popen[bytes]) -> str:
        """Read to the end, and return the last line that is not empty."""
        tail = b""
        assert process.stderr is not None
        while chunk := os.read(process.stderr.fileno(), 4096):
            tail = (tail + chunk)[-_TAIL_BYTES:]
            if self.show:
                sys.stderr.buffer.write(chunk)
                sys.stderr.buffer.flush()
        text = _ESCAPES.sub("", tail.decode(errors="replace")).replace("\r", "\n")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return lines[-1].removeprefix("Error: ") if lines else ""

    def stop(self) -> None:
        """End the processes that run, and start no more."""
        self._stopped = True
        for process in list(self._live):
            process.terminate()


def load_cell(folder: Path, cell: Cell, *, undisturbed: bool = False) -> CellResult | None:
    """Return the result of a cell; None if it is missing, or is not as ``undisturbed`` as asked."""
    path = folder / CELLS / f"{cell.key}.json"
    if not path.is_file():
        return None
    result = load_record(CellResult, path, fix="Delete it, and it is made again.")
    return None if undisturbed and not result.undisturbed else result


def run_cells(
    cells: Sequence[Cell],
    study: Study,
    folder: Path,
    *,
    jobs: int = 1,
    commands: Commands,
    fresh: bool = False,
) -> Iterator[tuple[Cell, CommandError | None]]:
    """Run cells in their order, and yield each one that ends with its error, if it failed.

    With ``fresh``, an interrupted cell restarts, so that its times are those of a whole run.

    Raises:
        LpdeployError: Two consecutive cells of different rows failed with the same error.
    """
    run = functools.partial(
        run_cell, study=study, folder=folder, commands=commands, alone=jobs == 1, fresh=fresh
    )
    previous: tuple[str, str] | None = None
    for cell, error in _run_in_order(cells, run, jobs=jobs, commands=commands):
        yield cell, error
        if previous and error and previous[0] == str(error) and previous[1] != cell.row.name:
            raise LpdeployError(
                f"Two cells in a row failed with the same error: {error} Correct that and run the "
                "same command again; finished cells are kept."
            )
        previous = (str(error), cell.row.name) if error else None


def _run_in_order(
    cells: Sequence[Cell], run: Callable[[Cell], None], *, jobs: int, commands: Commands
) -> Iterator[tuple[Cell, CommandError | None]]:
    if jobs == 1:  # no thread: writing the table must not disturb the times of the next cell
        for cell in cells:
            yield cell, _catch(run, cell)
        return
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        try:
            futures = [pool.submit(_catch, run, cell) for cell in cells]
            for cell, future in zip(cells, futures, strict=True):
                yield cell, future.result()
        finally:  # also if the caller stops early
            commands.stop()
            pool.shutdown(wait=True, cancel_futures=True)


def _catch(run: Callable[[Cell], None], cell: Cell) -> CommandError | None:
    try:
        run(cell)
    except CommandError as error:
        return error
    return None


def run_cell(
    cell: Cell,
    *,
    study: Study,
    folder: Path,
    commands: Commands,
    alone: bool = True,
    fresh: bool = False,
) -> None:
    """Prune, compact and measure; write ``cells/KEY.json``, and delete the weights.

    An interrupted cell resumes from the checkpoint of its prune, or after the prune, unless it
    must be ``fresh``. A failed cell leaves nothing. Times can be trusted if it runs ``alone``.

    Raises:
        CommandError: A command failed.
    """
    work = folder / WORK / cell.key
    if fresh:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    try:
        if cell.row.dense:
            result = _run_dense(cell, study, commands)
        else:
            result = _run_pruned(cell, study, work, commands)
        if not cell.evaluation:  # its scores are the result
            shutil.copyfile(
                RunFolder(work / "run").importance,
                folder / CELLS / f"{cell.key}.importance.safetensors",
            )
    except CommandError as error:
        if not error.killed:
            shutil.rmtree(work)
        raise
    undisturbed = not result.pop("interrupted", False) and alone
    record = CellResult(
        key=cell.key,
        model={"name": study.model.name, "sha256": study.model.identity},
        data={"name": study.data.name, "identity": study.data.identity},
        ratio=cell.ratio,
        seed=cell.seed,
        options=dict(cell.options),
        evaluation=cell.evaluation.to_json(),
        machine=replace(describe_machine(), command=""),
        undisturbed=undisturbed,
        **result,
    )
    save_json(folder / CELLS / f"{cell.key}.json", record.to_json())
    shutil.rmtree(work)


def _run_dense(cell: Cell, study: Study, commands: Commands) -> dict[str, Any]:
    return _measure(cell, study, commands, model=study.model.given)


def _run_pruned(cell: Cell, study: Study, work: Path, commands: Commands) -> dict[str, Any]:
    run, done = RunFolder(work / "run"), work / "prune.json"
    prune_words = list_prune_words(cell, study, run=run.path)
    if not done.is_file():
        pruned, resumed = prune_or_resume(prune_words, run, commands)
        pruned = {**pruned, "run": run.path.name}
        save_json(done, {"prune": pruned, "interrupted": resumed})
    result = load_record(dict[str, Any], done, fix="Delete it.")
    result["commands"] = [show_command(prune_words)]
    result["training"] = summarize_log(run)
    if cell.evaluation:
        compact_words = ["compact", str(run)]
        compacted = commands.call([*compact_words, "--overwrite"])
        measured = _measure(cell, study, commands, model=str(run))
        words = [*result["commands"], show_command(compact_words), *measured["commands"]]
        result["compact"] = {k: v for k, v in compacted.items() if k != "model"}
        result |= {**measured, "commands": words}
    return result


def prune_or_resume(words: Sequence[str], run: RunFolder, commands: Commands) -> tuple[Any, bool]:
    """Prune, or go on with a prune that was interrupted.

    Args:
        words: The command, without what says which of both.
        run: The run folder that the command names.
        commands: What runs it.

    Returns:
        What the command printed, and whether it went on.

    Raises:
        CommandError: It failed.
    """
    resume = run.checkpoint.is_file()
    return commands.call([*words, "--resume" if resume else "--overwrite"]), resume


def _measure(cell: Cell, study: Study, commands: Commands, *, model: str) -> dict[str, Any]:
    """Evaluate a model, or let it answer the instructions of Table 9."""
    if cell.evaluation.examples:
        words = list_generate_words(study, model=model)
        names = [own.name for own in fields(Text)]
        answers = commands.call(words)["answers"]
        texts = tuple(Text(**{name: answer[name] for name in names}) for answer in answers)
        return {"commands": [show_command(words)], "texts": texts}
    words = list_eval_words(cell, study, model=model)
    return {
        "commands": [show_command(words)],
        "eval": _name_sources(commands.call(words), cell),
    }


def _name_sources(measured: Mapping[str, Any], cell: Cell) -> dict[str, Any]:
    """Replace the paths of texts by the names that are shown."""
    names = {source.given: source.name for source in cell.evaluation.perplexity}
    kept = {k: v for k, v in measured.items() if k not in ("model", "perplexity")}
    texts = measured.get("perplexity", {})
    return {"perplexity": {names[given]: value for given, value in texts.items()}} | kept


def summarize_log(run: RunFolder) -> dict[str, float]:
    """Compute medians over the scored steps of a run, without the first, which warms up.

    Returns:
        ``steps``, and, if there are scored steps, ``step_seconds``, ``scoring_seconds`` and
        ``scoring_share``. Steps before and after the removal of groups share one median.
    """
    log = load_log(run)
    scored = [info for info in log if info.step > 1 and info.scoring_seconds > 0]
    summary: dict[str, float] = {"steps": sum(info.step > 0 for info in log)}
    if scored:
        summary |= {
            "step_seconds": statistics.median(info.seconds for info in scored),
            "scoring_seconds": statistics.median(info.scoring_seconds for info in scored),
            "scoring_share": statistics.median(
                info.scoring_seconds / info.seconds for info in scored
            ),
        }
    return summary


def check_output(folder: Path) -> None:
    """Raise an ArtifactError for a folder that is not empty and has no ``cells``."""
    if folder.is_dir() and not (folder / CELLS).is_dir():
        present = sorted(path.name for path in folder.iterdir())
        if present:
            raise ArtifactError(
                f"'{folder}' holds {present[0]}, and no cells of tables. "
                "Use an empty or a new --output, or one that 'lpdeploy paper' wrote."
            )
