"""What servers make of a tokenizer, as far as its ``tokenizer.json`` tells."""

import json
from typing import Any

from transformers import PreTrainedTokenizerBase


def describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return a fast tokenizer as ``tokenizer.json`` would hold it, whatever it was loaded from."""
    return json.loads(tokenizer.backend_tokenizer.to_str())


def list_steps(step: dict[str, Any] | None, children: str) -> list[dict[str, Any]]:
    """Flatten a normalizer or pre-tokenizer into its steps.

    Args:
        step: Its description, or None.
        children: What holds the steps of a sequence: ``normalizers`` or ``pretokenizers``.
    """
    if step is None:
        return []
    return step[children] if step["type"] == "Sequence" else [step]


def list_notes(tokenizer: PreTrainedTokenizerBase, *, server: str) -> list[str]:
    """Say what a tokenizer does to text before it looks at it that a server leaves out."""
    normalizers = list_steps(describe_tokenizer(tokenizer)["normalizer"], "normalizers")
    kinds = {step["type"] for step in normalizers}
    left_out = {"Lowercase": "makes text lowercase", "NFC": "composes accents (NFC)"}
    return [
        f"Its tokenizer {does} first, which {server} does not: do it before you ask."
        for kind, does in left_out.items()
        if kind in kinds
    ]
