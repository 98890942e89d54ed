"""Tokenized rows on disk: made once, then checked and mapped into memory by later runs.

Each data set is one safetensors file, named by the hash of what determines its rows. The file is
written whole and then renamed, so several processes may make it at the same time.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lpdeploy.artifacts import atomic_file
from lpdeploy.data.batches import TokenDataset
from lpdeploy.errors import DiskFullError
from lpdeploy.folders import remove_leftovers

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "LPDEPLOY_CACHE"
# Increase this when the same text and tokenizer give other rows, or counts, than before.
_ROWS_VERSION = 3
_UNREADABLE = (OSError, SafetensorError, RuntimeError)  # the last if torch cannot map the file
_ARRAYS = ("tokens", "labelled", "offsets")


def find_cache() -> Path:
    """Return the folder of the cache: ``$LPDEPLOY_CACHE``, or one beside the hub's cache."""
    from huggingface_hub.constants import HF_HOME

    return Path(os.environ.get(CACHE_VARIABLE) or Path(HF_HOME) / "lpdeploy").expanduser()


def hash_identity(identity: Mapping[str, Any]) -> str:
    """Return the name of a cache entry: a hash of all that it depends on, as JSON."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def load_or_build(
    folder: Path, identity: Mapping[str, Any], *, build: Callable[[], TokenDataset]
) -> TokenDataset:
    """Load rows from the cache, or make them and keep them there.

    Args:
        folder: Folder of the cache.
        identity: All that the rows depend on, as JSON: hashes of text and tokenizer, options.
        build: Makes the rows.

    Returns:
        Rows mapped into memory, after a check against their stored hash. If they cannot be
        stored, the rows of ``build``.
    """
    identity = {"rows_version": _ROWS_VERSION, **identity}
    text = json.dumps(identity, sort_keys=True)
    path = folder / "tokens" / f"{hash_identity(identity)}.safetensors"
    if path.exists():
        try:
            dataset = _load(path, text)
        except (*_UNREADABLE, ValueError, KeyError) as error:
            logger.warning("'%s' is damaged or not of lpdeploy (%s): tokenizing anew.", path, error)
        else:
            logger.info("Using the cached tokens of %s rows in '%s'.", len(dataset), path)
            return dataset
    dataset = build()
    try:
        _save(path, dataset, text)
        return _map(path)[0]
    except (*_UNREADABLE, DiskFullError) as error:
        logger.warning("The tokens cannot be kept in '%s' (%s).", path.parent, error)
        return dataset


def _save(path: Path, dataset: TokenDataset, identity: str) -> None:
    arrays = {name: getattr(dataset, name) for name in _ARRAYS}
    metadata = {
        "identity": identity,
        "sha256": dataset.sha256,
        "num_dropped": str(dataset.num_dropped),
        "num_cut": str(dataset.num_cut),
        **({} if dataset.chat_template is None else {"chat_template": dataset.chat_template}),
    }
    remove_leftovers(path)
    with atomic_file(path) as temporary:
        save_file(arrays, temporary, metadata=metadata)


def _load(path: Path, identity: str) -> TokenDataset:
    dataset, metadata = _map(path)
    if metadata["identity"] != identity:
        raise ValueError("it was made of something else")
    if dataset.sha256 != metadata["sha256"]:
        raise ValueError("its rows differ from their hash")
    return dataset


def _map(path: Path) -> tuple[TokenDataset, Mapping[str, str]]:
    # As torch tensors, which are views of the mapped file; safetensors' numpy arrays are copies.
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        arrays = {name: file.get_tensor(name).numpy() for name in _ARRAYS}
    for array in arrays.values():
        array.flags.writeable = False
    dataset = TokenDataset(
        **arrays,
        num_dropped=int(metadata["num_dropped"]),
        num_cut=int(metadata["num_cut"]),
        chat_template=metadata.get("chat_template"),
    )
    return dataset, metadata
