"""What can be told of a run before anything heavy is imported."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lpdeploy.config import PruneConfig
from lpdeploy.data.sources import check_source
from lpdeploy.environment import count_ranks
from lpdeploy.errors import LpdeployError
from lpdeploy.models.find import check_model
from lpdeploy.pruning.tracking import check_trackers
from lpdeploy.run_folder import RunFolder


def check_data(
    options: PruneConfig, *, data: Any, valid: Any = None, report_to: Sequence[str] = ()
) -> None:
    """Check the names of the data that a run reads, and of what watches it.

    Only names are read, so this takes no time. What the files hold is checked later.

    Args:
        options: How to prune.
        data: File, folder or hub name, or rows.
        valid: Likewise; None for none.
        report_to: Experiment trackers.

    Raises:
        LpdeployError: One of them cannot be used.
    """
    check_source(data)
    check_beside(options, valid=valid, report_to=report_to)


def check_place(model: str, output: Path, *, resume: bool, overwrite: bool) -> None:
    """Check the name of a model, and that a run of it may be written to a folder, or go on there.

    Of several ranks, the first one checks it later: it alone holds the folder.

    Args:
        model: Hugging Face folder or hub name.
        output: The run folder.
        resume: Whether an interrupted run is to go on.
        overwrite: Whether a run that is there already is to be replaced.

    Raises:
        ArtifactError: The model or the folder cannot be used.
        RunInUseError: Another process holds the folder.
    """
    check_model(model)
    if count_ranks() > 1:
        return
    base, run = Path(model) if Path(model).is_dir() else None, RunFolder(output)
    with run.hold():
        run.check_free(base=base, resume=resume, overwrite=overwrite)


def check_beside(options: PruneConfig, *, valid: Any, report_to: Sequence[str]) -> None:
    """Check what watches a run, and the options that belong to it; as ``check_data``."""
    check_trackers(report_to)
    if valid is not None:
        check_source(valid)
        return
    for name in ("eval_every", "eval_samples"):
        if getattr(options, name) is not None:
            raise LpdeployError(
                f"`{name}` belongs to `valid`. Give that too, or leave `{name}` out."
            )
