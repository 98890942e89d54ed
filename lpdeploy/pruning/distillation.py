"""What distillation needs before the first step: what the unpruned model expects of the rows."""

import fcntl
import logging
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from lpdeploy.config import PruneConfig
from lpdeploy.data.batches import Progress, TokenDataset
from lpdeploy.data.cache import find_cache
from lpdeploy.folders import lock_folder
from lpdeploy.models.loading import DTYPES, load_model, resolve_dtype
from lpdeploy.pruning.ranks import Ranks
from lpdeploy.pruning.setup import Source
from lpdeploy.pruning.teacher import (
    LiveTeacher,
    Teacher,
    TeacherCache,
    describe_cache,
    fill_cache,
    find_teacher_folder,
    list_training_rows,
)
from lpdeploy.pruning.training import count_steps
from lpdeploy.pruning.walk import make_autocast

logger = logging.getLogger(__name__)

_TOP_K = 128  # of tokens that a teacher keeps, unless the options say otherwise


def prepare_teacher(
    source: Source,
    dataset: TokenDataset,
    options: PruneConfig,
    ranks: Ranks,
    *,
    base_sha256: str,
    on_progress: Progress | None = None,
) -> Teacher | None:
    """Let the unpruned model say what it expects in the rows of the training, as far as needed.

    It is loaded and freed again before the training has its own; or it stays, with
    ``distill_live``.

    Args:
        source: The base.
        dataset: Tokens.
        options: How to prune.
        ranks: The processes that share the rows.
        base_sha256: Hash of the base.
        on_progress: Is told (rows done, all rows).

    Returns:
        What tells it; None without distillation.
    """
    if not options.distill:
        return None
    dtype = resolve_dtype(options.dtype, source.config, device=ranks.device.type)
    if options.distill_live:
        return LiveTeacher(
            _load_teacher(source, options, ranks, dtype=dtype),
            **_list_settings(source, options),
            autocast=partial(make_autocast, ranks.device, DTYPES[dtype]),
        )
    cache = _find_teacher(source, dataset, options, dtype=dtype, base_sha256=base_sha256)
    rows = list_training_rows(
        dataset,
        steps=count_steps(options, len(dataset)),
        batch_size=options.batch_size,
        seed=options.seed,
    )
    # Another run may need the same rows: it waits, and finds them.
    with lock_folder(cache.folder, fcntl.LOCK_EX) if ranks.is_first else nullcontext():
        missing = _list_missing(cache, rows, ranks)
        if ranks.is_first:
            logger.info(describe_cache(cache, rows, missing))
        own = missing[ranks.rank :: ranks.size]
        if own:
            fill_cache(
                cache,
                _load_teacher(source, options, ranks, dtype=dtype),
                own,
                batch_size=options.micro_batch_size,
                autocast=partial(make_autocast, ranks.device, DTYPES[dtype]),
                on_progress=on_progress if ranks.is_first else None,
            )
        ranks.sum([torch.zeros(1, device=ranks.device)])  # nobody reads before all have written
    return cache


def _list_missing(cache: TeacherCache, rows: list[int], ranks: Ranks) -> list[int]:
    """List the rows that are not there yet, as the first rank sees them."""
    missing = set(cache.list_missing(rows))
    is_missing = torch.tensor([int(row in missing) for row in rows], device=ranks.device)
    ranks.copy_first([is_missing])
    return [row for row, lacks in zip(rows, is_missing.tolist(), strict=True) if lacks]


def _load_teacher(source: Source, options: PruneConfig, ranks: Ranks, *, dtype: str) -> Any:
    device, load_in = str(ranks.device), options.load_in
    return load_model(source.folder, dtype=dtype, device=device, load_in=load_in)


def _list_settings(source: Source, options: PruneConfig) -> Mapping[str, Any]:
    return {
        "top_k": min(options.distill_top_k or _TOP_K, source.config.vocab_size),
        "weight": options.distill,
        "temperature": options.distill_temperature or 1.0,
    }


def _find_teacher(
    source: Source, dataset: TokenDataset, options: PruneConfig, *, dtype: str, base_sha256: str
) -> TeacherCache:
    settings = _list_settings(source, options)
    identity = {
        "base": base_sha256,
        "data": dataset.sha256,
        "temperature": settings["temperature"],
        "top_k": settings["top_k"],
        "precision": [dtype, options.load_in],
    }
    return TeacherCache(
        folder=find_teacher_folder(find_cache(), identity),
        dataset=dataset,
        wide=source.config.vocab_size > 1 << 16,
        **settings,
    )
