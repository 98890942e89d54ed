"""Data sets of the Hugging Face hub that have a short name, and how each is read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class HubSource:
    """How a data set of the hub is read.

    Attributes:
        repository: ``owner/name``, with parquet or JSON files, since datasets runs no scripts.
        options: Further arguments of ``datasets.load_dataset``.
        column: The column of plain text; None to look at the names of the columns.
        separator: Joins all rows into one document; None if each row is a document.
        test_split: Name of the split to evaluate on; None if there is none.
        max_rows: Largest number of rows to read, for splits that are too large.
    """

    repository: str
    options: Mapping[str, Any] = field(default_factory=dict)
    column: str | None = None
    separator: str | None = None
    test_split: str | None = "test"
    max_rows: Mapping[str, int] = field(default_factory=dict)


# WikiText-2 and PTB are joined as in GPTQ and SparseGPT, which the paper follows (Section 4.1). PTB
# is a script data set, which datasets 4 and later refuse; the hub's conversion branch has a parquet
# copy. C4 is hundreds of GB, so only the first shard is read, as they do: the paper's 20k documents
# to train on, and their 1,100 to evaluate on.
HUB_SOURCES: dict[str, HubSource] = {
    "wikitext2": HubSource(
        "Salesforce/wikitext",
        options={"name": "wikitext-2-raw-v1"},
        column="text",
        separator="\n\n",
    ),
    "ptb": HubSource(
        "ptb-text-only/ptb_text_only",
        options={
            "revision": "refs/convert/parquet",
            "data_files": {
                split: f"penn_treebank/{split}/*.parquet"
                for split in ("train", "validation", "test")
            },
        },
        column="sentence",
        separator=" ",
    ),
    "c4": HubSource(
        "allenai/c4",
        options={
            "data_files": {
                "train": "en/c4-train.00000-of-01024.json.gz",
                "validation": "en/c4-validation.00000-of-00008.json.gz",
            },
            "streaming": True,
        },
        column="text",
        test_split="validation",
        max_rows={"train": 20_000, "validation": 1_100},
    ),
    "lamini": HubSource("MBZUAI/LaMini-instruction", test_split=None),
    "alpaca": HubSource("yahma/alpaca-cleaned", test_split=None),
}
