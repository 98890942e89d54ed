"""Where the model lies that a user names: by its folder, by its run, or by its name on the hub."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lpdeploy.artifacts import compute_sha256
from lpdeploy.errors import ArtifactError
from lpdeploy.folders import check_untouched
from lpdeploy.models.find import resolve_model
from lpdeploy.models.record import ModelRecord, load_model_record
from lpdeploy.run_folder import ADAPTER, RunFolder, name_export


@dataclass(frozen=True)
class ModelPlace:
    """A model on disk, and the place of everything that is made of it.

    Attributes:
        given: What the user gave: a run, a folder or a name on the hub.
        folder: The Hugging Face folder.
        run: The run that it belongs to; None for any other model.
        unmerged: Whether LoRA lies beside the weights, in the folder ``adapter``.
    """

    given: str
    folder: Path
    run: RunFolder | None
    unmerged: bool = False

    @property
    def adapter(self) -> Path | None:
        """The adapter beside an unmerged model; None for any other."""
        return self.folder / ADAPTER if self.unmerged else None

    @property
    def records(self) -> Path:
        """The folder that keeps what stages record: the run, or the model's own folder."""
        return self.run.path if self.run else self.folder

    @property
    def inputs(self) -> tuple[Path, ...]:
        """What an output may not replace."""
        return (self.run.path, self.folder) if self.run else (self.folder,)

    @contextmanager
    def hold(self, *, shared: bool = False) -> Iterator[None]:
        """Hold the run that the model belongs to, as ``RunFolder.hold`` does."""
        if self.run is None:
            yield
            return
        with self.run.hold(shared=shared):
            yield

    def list_parts(self) -> list[Path]:
        """List the folders of the run, the model's among them; of any other model, its folder."""
        return list(self.run.list_parts()) if self.run else [self.folder]

    def get_export(self, engine: str) -> Path:
        """Return the folder in which an export of this model lies by default."""
        return self.records / name_export(engine, unmerged=self.unmerged)

    def load_record(self) -> ModelRecord | None:
        """Read what ``compact`` recorded; None for a model that it did not write."""
        return load_model_record(self.folder)

    def compute_sha256(self) -> str:
        """Return the hash of weights and config: as it was recorded, or computed now."""
        from lpdeploy.models.loading import compute_model_sha256  # with torch

        record = self.load_record()
        return record.sha256 if record else compute_model_sha256(self.folder)


def locate_model(given: str | os.PathLike[str], *, unmerged: bool = False) -> ModelPlace:
    """Find the model that a RUN or MODEL names.

    A run stands for the model that ``compact`` made of it; the folder ``RUN/model`` is the same
    place as ``RUN``.

    Args:
        given: Run, model folder or hub name.
        unmerged: Of a run, take the model whose adapter is not merged.

    Raises:
        ArtifactError: There is no such model, or the run's model was made by another plan.
    """
    run = _find_run(Path(given))
    if run is not None:
        return ModelPlace(str(given), _find_compacted(run, unmerged=unmerged), run, unmerged)
    if unmerged:
        raise ArtifactError(
            f"`unmerged=True` needs a run, and '{given}' is none: it has no plan. Leave it out."
        )
    folder = resolve_model(str(given))
    check_untouched(folder, fix="Make it again, or restore the file.")
    return ModelPlace(str(given), folder, None)


def check_has_base(model: str | os.PathLike[str]) -> None:
    """Check that what a user gives is a run, which names the model that it was pruned from.

    Raises:
        ArtifactError: It is none.
    """
    if not RunFolder(model).is_complete:
        raise ArtifactError(f"`with_base=True` needs a run, and '{model}' is none. Leave it out.")


def _find_run(path: Path) -> RunFolder | None:
    run, parent = RunFolder(path), RunFolder(path.resolve().parent)
    if run.is_complete or run.is_ours:
        return run
    inside = parent.is_complete and path.resolve() == parent.model.resolve()
    return RunFolder(path.parent) if inside else None


def _find_compacted(run: RunFolder, *, unmerged: bool) -> Path:
    run.load_plan()
    folder = run.get_model(unmerged=unmerged)
    command = f"lpdeploy compact {run}" + (" --keep-adapter" if unmerged else "")
    if not folder.is_dir():
        raise ArtifactError(f"No {folder.name} in '{run}'. Run '{command}' first.")
    check_untouched(folder, fix=f"Run '{command} --overwrite', or restore the file.")
    record = load_model_record(folder)
    if record is not None and record.plan_sha256 != compute_sha256(run.plan):
        raise ArtifactError(
            f"'{folder}' was made by another plan than that of the run. "
            f"Run '{command} --overwrite' first."
        )
    return folder
