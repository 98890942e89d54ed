"""Data that is in memory already: a ``datasets.Dataset``, or any other rows."""

import os
from typing import Any

from lpdeploy.data.sources import (
    Corpus,
    build_corpus,
    compute_source_sha256,
    load_corpus,
    parse_row,
)


def load_any(data: Any, *, split: str = "train") -> Corpus:
    """Read the documents or instruction pairs of a source by name, or of rows.

    Args:
        data: What ``load_corpus`` takes, or rows as mappings, with the columns that a file may
            have: ``text``, or ``instruction`` (and ``input``) and ``response`` or ``output``.
        split: As of ``load_corpus``.

    Raises:
        DataError: As ``load_corpus``.
    """
    if isinstance(data, str | os.PathLike):
        return load_corpus(os.fspath(data), split=split)
    name = name_source(data)
    rows = (parse_row(dict(row), f"row {number} of {name}") for number, row in enumerate(data))
    return build_corpus(name, rows)


def name_source(data: Any) -> str:
    """Return what records call a source: its path or name, or the fingerprint of a data set."""
    if isinstance(data, str | os.PathLike):
        return os.fspath(data)
    return f"dataset {_get_fingerprint(data) or 'in memory'}"


def identify_source(data: Any) -> str | None:
    """Hash a source without parsing it; None if nothing is known of it before."""
    if isinstance(data, str | os.PathLike):
        return compute_source_sha256(os.fspath(data))
    return _get_fingerprint(data)


def _get_fingerprint(data: Any) -> str | None:
    # datasets has no public name for it; it changes with every transform of the rows.
    return getattr(data, "_fingerprint", None)
