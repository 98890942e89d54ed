"""Sending what each step did to an experiment tracker, through accelerate."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from lpdeploy.errors import LpdeployError, MissingDependencyError, quote_error
from lpdeploy.pruning.log import StepInfo
from lpdeploy.run_folder import RunFolder

logger = logging.getLogger(__name__)

TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow")
"""The experiment trackers that a run can report to."""
_PROJECT = "lpdeploy"


def check_trackers(names: Sequence[str]) -> None:
    """Check that trackers are known and installed.

    Raises:
        LpdeployError: One is unknown.
        MissingDependencyError: The package of one is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise LpdeployError(
                f"There is no tracker '{name}'. Use {', '.join(TRACKERS[:-1])} or {TRACKERS[-1]}."
            )
        if find_spec(name) is None:
            raise MissingDependencyError(
                f"`report_to` {name} needs the package {name}. Install it with: pip install {name}"
            )


@contextmanager
def open_trackers(
    names: Sequence[str], run: RunFolder, record: Mapping[str, Any], *, first: int = 0
) -> Iterator[Callable[[StepInfo], None]]:
    """Open trackers for a run, and yield what tells them of a step.

    A tracker that fails is left out from then on, with a warning: the run goes on.

    Args:
        names: Of the trackers; see ``TRACKERS``.
        run: What the run is called in them. TensorBoard's files go into its folder.
        record: What the run was started with.
        first: The step that it goes on with; what TensorBoard has of later ones is left out.
    """
    names = tuple(dict.fromkeys(names))
    trackers: dict[str, Any] = {}
    failed: set[str] = set()

    def attempt(name: str, work: str, *values: Any, **more: Any) -> None:
        if name in failed:
            return
        try:
            if name not in trackers:
                trackers[name] = _build(name, run, first)
            getattr(trackers[name], work)(*values, **more)
        except Exception as error:  # noqa: BLE001 - whatever a tracker raises must not end a run
            failed.add(name)
            logger.warning("%s takes no more figures (%s).", name, quote_error(error))

    def tell(info: StepInfo) -> None:
        for name in names:
            attempt(name, "log", _list_values(info), step=info.step)

    settings = {key: _simplify(value) for key, value in record.items()}
    for name in names:
        attempt(name, "start")
        attempt(name, "store_init_configuration", settings)
    try:
        yield tell
    finally:
        for name in names:
            attempt(name, "finish")


def _build(name: str, run: RunFolder, first: int) -> Any:
    from accelerate import tracking

    title = run.path.resolve().name
    match name:
        case "tensorboard":
            folder = run.tensorboard
            return tracking.TensorBoardTracker(folder.name, folder.parent, purge_step=first)
        case "mlflow":
            return tracking.MLflowTracker(_PROJECT, run_name=title)
        case "wandb":
            return tracking.WandBTracker(_PROJECT, name=title)
        case _:
            return tracking.TrackioTracker(_PROJECT, name=title)


def _list_values(info: StepInfo) -> dict[str, float]:
    """Return the figures of a step, by the names that a tracker shows them under."""
    found = {
        "train/loss": info.loss,
        "train/lr": info.lr,
        "train/tokens_per_s": info.tokens_per_s,
        "memory/peak_bytes": float(info.peak_bytes),
        "valid/loss": info.valid_loss,
        "event/loss_before": info.loss_before,
        "event/loss_after": info.loss_after,
        **{f"removed/{name}": share for name, share in (info.achieved or {}).items()},
    }
    return {name: value for name, value in found.items() if value is not None}


def _simplify(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) else str(value)
