"""A run folder: the name of everything in it, who holds it, and what in it may be replaced.

Standard library only. No other module spells these names.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from lpdeploy.artifacts import check_unchanged
from lpdeploy.errors import ArtifactError, RunInUseError
from lpdeploy.folders import (
    FOLDER_RECORD,
    MANIFEST,
    FolderRecord,
    check_replaceable,
    check_untouched,
    load_folder_record,
    make_folders,
    open_lock,
    recorded_files,
    remove_empty_folders,
    remove_leftovers,
)
from lpdeploy.manifest import load_output_hash
from lpdeploy.plan import PruningPlan, load_plan

RUN, BASE, ADAPTER, MODEL, EXPORT, PACKAGE = "run", "base", "adapter", "model", "export", "package"
"""Kinds of folders that lpdeploy writes."""

_UNMERGED_EXPORT = "{engine}-unmerged"
_LOCK = ".lock"
_BENCH = (".json", ".md", ".svg")
_WRITERS = {name: name for name in ("eval", "verify", "report")}
_WRITERS |= {"bench": "bench latency", "samples": "generate"}


@dataclass(frozen=True, init=False)
class RunFolder:
    """What ``prune`` writes, and what later stages add to it.

    Attributes:
        path: The folder. It need not exist yet.
    """

    path: Path

    def __init__(self, path: str | os.PathLike[str]) -> None:
        object.__setattr__(self, "path", Path(path))

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    # What is in it.

    @property
    def plan(self) -> Path:
        """Which groups stay. The last file that ``prune`` writes: a run that has it is complete."""
        return self.path / "plan.json"

    @property
    def base(self) -> Path:
        """The unpruned model, if it was given as an object and so had no folder of its own."""
        return self.path / "base"

    @property
    def adapter(self) -> Path:
        """LoRA of the pruned model, as PEFT saves it."""
        return self.path / "adapter"

    @property
    def refit(self) -> Path:
        """The weights that were refitted, where there are any; see ``PruneConfig.refit``."""
        return self.path / "refit.safetensors"

    @property
    def importance(self) -> Path:
        """Importance of every group when it was last scored."""
        return self.path / "importance.safetensors"

    @property
    def log(self) -> Path:
        """One line of JSON for each step."""
        return self.path / "log.jsonl"

    @property
    def manifest(self) -> Path:
        """Options, hashes, versions, time and memory of every stage."""
        return self.path / MANIFEST

    @property
    def recipe(self) -> Path:
        """The options of ``prune``, resolved."""
        return self.path / "recipe.yaml"

    @property
    def target(self) -> Path:
        """How the ratios were chosen, where a size or a latency was asked for."""
        return self.path / "target.json"

    @property
    def chat(self) -> Path:
        """How the conversations were written that the model is tuned on, if it is."""
        return self.path / "chat.json"

    @property
    def checkpoint(self) -> Path:
        """State of training that ``--resume`` goes on from; gone when the run is complete."""
        return self.path / "checkpoint" / "state.safetensors"

    @property
    def tensorboard(self) -> Path:
        """What TensorBoard was told of the steps."""
        return self.path / "tensorboard"

    @property
    def model(self) -> Path:
        """The dense, merged model that ``compact`` writes."""
        return self.path / "model"

    @property
    def unmerged(self) -> Path:
        """The pruned base that ``compact --keep-adapter`` writes, with its adapter inside."""
        return self.path / "unmerged"

    @property
    def verification(self) -> Path:
        """What ``verify`` found."""
        return self.path / "verify.json"

    @property
    def evaluation(self) -> Path:
        """What ``eval`` measured."""
        return self.path / "eval.json"

    @property
    def benchmark(self) -> Path:
        """What ``bench latency`` measured; a table and a plot of the same name lie beside it."""
        return self.path / "bench.json"

    @property
    def samples(self) -> Path:
        """Text that the dense and the pruned model generated."""
        return self.path / "samples.json"

    @property
    def page(self) -> Path:
        """The page about the run."""
        return self.path / "report.html"

    def get_model(self, *, unmerged: bool) -> Path:
        """Return the folder of the merged or of the unmerged model."""
        return self.unmerged if unmerged else self.model

    def get_export(self, engine: str, *, unmerged: bool = False) -> Path:
        """Return the folder in which an export of this run lies by default."""
        return self.path / name_export(engine, unmerged=unmerged)

    @property
    def _files(self) -> tuple[Path, ...]:
        bench = (self.benchmark.with_suffix(end) for end in _BENCH)
        return (
            *(self.plan, self.refit, self.importance, self.log, self.manifest, self.recipe),
            *(self.target, self.chat, self.checkpoint, self.verification),
            *(self.evaluation, *bench, self.samples, self.page),
        )

    @property
    def _folders(self) -> dict[Path, str]:
        return {self.base: BASE, self.adapter: ADAPTER, self.model: MODEL, self.unmerged: MODEL}

    # What state it is in.

    @property
    def is_complete(self) -> bool:
        """Whether ``prune`` has come to its end here."""
        return self.plan.is_file()

    @property
    def is_ours(self) -> bool:
        """Whether lpdeploy made this folder for a run."""
        record = load_folder_record(self.path)
        return record is not None and record.kind == RUN

    def load_plan(self) -> PruningPlan:
        """Read the plan, checked against the hash that ``prune`` recorded.

        Raises:
            ArtifactError: The run is not complete, or its plan was changed afterwards.
        """
        if not self.is_complete and self.checkpoint.is_file():
            raise ArtifactError(
                f"The run in '{self}' is not complete. Run 'lpdeploy prune' with its options and "
                "`resume=True` first."
            )
        self.check_files(self.manifest, self.plan)
        plan = load_plan(self.plan)
        expected = load_output_hash(self.path, "prune", self.plan.name)
        check_unchanged(self.plan, expected, fix="Restore it, or prune again.")
        return plan

    # What was written.

    def recorded(self, *files: Path) -> AbstractContextManager[None]:
        """Let files of the run be written or removed, and record what they are afterwards."""
        return recorded_files(self.path, *files)

    def check_files(self, *files: Path) -> int:
        """Refuse files of the run that have changed since lpdeploy wrote them; count the others.

        They are small, so they are always hashed. A file that is gone is as good as one of a stage
        that has not run.

        Args:
            files: Which; all by default. Folders of the run have records of their own.

        Raises:
            ArtifactError: One has changed.
        """
        count = 0
        for file in filter(Path.is_file, files or self._files):
            writer = _WRITERS.get(file.stem)
            again = f"delete it and run 'lpdeploy {writer} {self}'" if writer else "prune"
            fix = f"Restore it, or {again} again."
            count += check_untouched(self.path, only=[file], fix=fix)
        return count

    # Who holds it.

    @contextmanager
    def hold(self, *, shared: bool = False) -> Iterator[None]:
        """Keep other processes from writing into the run meanwhile.

        The lock ends with the process. Where no run came of it, the folder is left as it was.

        Args:
            shared: Let others read at the same time; nobody may prune, compact or export.

        Raises:
            RunInUseError: Another process holds the run.
        """
        made = make_folders(self.path)
        lock = self.path / _LOCK
        is_new = not lock.exists()
        with open_lock(lock, shared=shared) as stream:
            try:
                if stream is not None:
                    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
                    fcntl.flock(stream, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunInUseError(
                    f"'{self}' is in use by another lpdeploy process. Wait until that has ended, "
                    "or use another `output`."
                ) from None
            try:
                yield
            finally:
                if is_new and not (self.is_ours or self.is_complete):
                    lock.unlink(missing_ok=True)
                remove_empty_folders(made)

    # What may be replaced.

    def check_free(self, *, base: Path | None, resume: bool, overwrite: bool) -> None:
        """Refuse a run that would write over something, or that cannot be resumed.

        Args:
            base: The model that is to be pruned; None if it has no folder yet.
            resume: Whether an interrupted run is to go on.
            overwrite: Whether a run that is there already is to be replaced.

        Raises:
            ArtifactError: That.
        """
        kept = load_folder_record(self.base)
        own = base == self.base and kept is not None and kept.kind == BASE
        check_output(self.path, inputs=() if own or base is None else (base,))
        paths = [path for path in (*self._files, *self._folders) if path != base]
        present = [path.name for path in paths if path.exists()]
        record = load_folder_record(self.path)
        if record is not None and record.kind != RUN:
            raise ArtifactError(
                f"'{self}' holds another result of lpdeploy ({record.kind}). Use another `output`."
            )
        if record is None:
            if present:
                raise ArtifactError(
                    f"'{self}' holds '{present[0]}', and lpdeploy did not make this folder. "
                    "Nothing was replaced: use another `output`."
                )
        elif resume and self.is_complete:
            raise ArtifactError(
                f"Nothing to resume: the run in '{self}' is complete. "
                f"Go on with 'lpdeploy compact {self}'."
            )
        elif overwrite:
            for folder, kind in self.list_parts().items():
                check_replaceable(folder, kind=kind, overwrite=True)
        elif present and not resume:
            ways = "" if self.is_complete else "`resume=True` to go on from its checkpoint, "
            raise ArtifactError(
                f"'{self}' already holds a run. Use {ways}"
                "`overwrite=True` to replace it, or another `output`."
            )

    def claim(self, *, clear: bool, base: Path | None = None) -> None:
        """Make the folder a run's.

        Args:
            clear: Remove what an earlier run left, and nothing else.
            base: The model that is to be pruned; it stays if it lies in the run.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if clear:
            self.clear(base=base)
        for path in (*self._files, *self._folders, self.path / FOLDER_RECORD):
            remove_leftovers(path)
        FolderRecord(RUN).save(self.path)

    def clear(self, *, base: Path | None = None) -> None:
        """Remove everything that lpdeploy wrote for this run, and nothing else.

        Packages stay: they are complete without the run. So does ``base``.

        Raises:
            ArtifactError: A folder of the run holds a file that lpdeploy did not write.
        """
        parts = {path: kind for path, kind in self.list_parts().items() if path != base}
        for folder, kind in parts.items():
            check_replaceable(folder, kind=kind, overwrite=True)
        for folder in parts:
            shutil.rmtree(folder)
        shutil.rmtree(self.tensorboard, ignore_errors=True)
        for file in self._files:
            file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not there, or something else lies in it
            self.checkpoint.parent.rmdir()

    def list_parts(self) -> dict[Path, str]:
        """List the folders of the run that are there, and what they should be."""
        parts = {folder: kind for folder, kind in self._folders.items() if folder.exists()}
        for path in self.path.iterdir() if self.path.is_dir() else ():
            record = load_folder_record(path) if path.is_dir() else None
            if record is not None and record.kind == EXPORT:
                parts[path] = EXPORT
        return parts


def name_export(engine: str, *, unmerged: bool = False) -> str:
    """Return the name that the folder of an export has by default."""
    return _UNMERGED_EXPORT.format(engine=engine) if unmerged else engine


def check_output(output: Path, *, inputs: Iterable[Path], default: Path | None = None) -> None:
    """Refuse an output that would destroy what it is made from, or a part of a run.

    Args:
        output: File or folder that a command is to write.
        inputs: What it is made from.
        default: Where that command writes when nothing else is asked for: always allowed.

    Raises:
        ArtifactError: ``output`` is, holds, or lies inside one of these.
    """
    place = output.resolve()
    if default is not None and place == default.resolve():
        return
    for path in inputs:
        if path.resolve().is_relative_to(place):
            raise ArtifactError(f"'{output}' holds what it is made from. Use another `output`.")
        run = RunFolder(path)
        if place.is_relative_to(path.resolve()) and not (run.is_complete or run.is_ours):
            raise ArtifactError(
                f"'{output}' lies inside '{path}', which it is made from. Use another `output`."
            )
    for parent in (place, *place.parents):
        record = load_folder_record(parent)
        if record is not None and record.kind == RUN:
            _refuse_part(output, RunFolder(parent), place)
        elif record is not None and parent != place:
            raise ArtifactError(
                f"'{output}' lies inside '{parent}', which lpdeploy replaces as a whole. Use "
                "another `output`."
            )


def _refuse_part(output: Path, run: RunFolder, place: Path) -> None:
    parts = (*run._files, *run._folders, run.checkpoint.parent)
    if any(place.is_relative_to(part) for part in parts):
        raise ArtifactError(
            f"'{output}' is a part of the run in '{run}'. Use another `output`, or leave it out."
        )
