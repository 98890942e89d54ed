"""What trials found out, on disk, so that none is made twice.

A choice among several shapes takes minutes with a small model, and far longer with a large one. If
it is stopped, it goes on with the trial that it was at. A later run that differs only in its
training finds all of them.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lpdeploy.artifacts import save_json
from lpdeploy.config import PruneConfig
from lpdeploy.criteria import is_built_in
from lpdeploy.data.batches import TokenDataset
from lpdeploy.data.cache import find_cache, hash_identity
from lpdeploy.errors import ArtifactError
from lpdeploy.machine import list_versions
from lpdeploy.models.loading import compute_model_sha256, resolve_device, resolve_dtype
from lpdeploy.pruning.setup import Source
from lpdeploy.records import load_record

logger = logging.getLogger(__name__)

# Increase this when the same identity gives another loss than before.
_VERSION = 1


@dataclass(frozen=True)
class TrialCache:
    """The losses of trials of one model on one data set.

    Attributes:
        folder: The folder that they are kept in; None keeps none.
        base: The hash of the model.
        data: The hash of the rows.
        runs_on: The device and precision that trials run on and in.
    """

    folder: Path | None = None
    base: str = ""
    data: str = ""
    runs_on: tuple[str, str] = ("", "")

    def measure(self, options: PruneConfig, measure: Callable[[], float]) -> float:
        """Return the loss of a trial: an earlier one's, or that of ``measure``, which is kept.

        Args:
            options: The options of the trial.
            measure: Runs the trial and returns its loss.
        """
        if self.folder is None:
            return measure()
        identity = {
            "version": _VERSION,
            "base": self.base,
            "data": self.data,
            "runs_on": list(self.runs_on),
            "versions": list_versions(),
            "options": options.to_json(),
        }
        path = self.folder / f"{hash_identity(identity)}.json"
        known = _load(path)
        if known is not None:
            logger.info("This was tried before, with the same model, data and options:")
            return known
        loss = measure()
        if math.isfinite(loss):
            try:
                save_json(path, {"loss": loss})
            except (ArtifactError, OSError) as error:
                logger.warning("The result of this trial cannot be kept (%s).", error)
        return loss


def open_trial_cache(
    source: Source, dataset: TokenDataset, options: PruneConfig, *, cache: bool
) -> TrialCache:
    """Return the cache of the trials of a run.

    Args:
        source: The base.
        dataset: Tokens.
        options: How to prune.
        cache: Whether to keep anything, and to use what was kept.
    """
    if not cache or not is_built_in(options.criterion):  # another one may change with its program
        return TrialCache()
    device = resolve_device(options.device)
    return TrialCache(
        folder=find_cache() / "trials",
        base=compute_model_sha256(source.folder),
        data=dataset.sha256,
        runs_on=(device, resolve_dtype(options.dtype, source.config, device=device)),
    )


def _load(path: Path) -> float | None:
    try:
        if not path.is_file():
            return None
        loss = load_record(dict[str, float], path, fix="Delete it.")["loss"]
    except (ArtifactError, KeyError, OSError) as error:
        logger.warning("'%s' cannot be used (%s): trying anew.", path, error)
        return None
    return loss if math.isfinite(loss) else None
