"""A tokenizer in the terms of GGUF: pieces, kinds, scores and merges that llama.cpp reads alike.

llama.cpp knows tokenizers by their algorithm and by the name of how text is split first, not by a
description of both as ``tokenizer.json`` is. What it has no name for is refused.
"""

import re
from dataclasses import dataclass, field
from typing import Any, NoReturn

from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase

from lpdeploy.errors import ArtifactError
from lpdeploy.servers.tokenizers import describe_tokenizer, list_notes, list_steps

# As llama.cpp numbers them.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How byte-level BPE splits text into words -> llama.cpp's name for it.
_SPLITS = {_WORDS % r"\p{N}{1,3}": "llama-bpe", _WORDS % r"\p{N}": "qwen2", None: "gpt-2"}
# Changes of the text that both sides make, and two that ``list_notes`` tells the user of.
_CHANGES = {"Prepend", "Replace", "Lowercase", "NFC"}
_SPACE = "\u2581"


@dataclass
class Vocabulary:
    """What llama.cpp is told of a tokenizer, besides its special tokens.

    Attributes:
        model: ``llama`` (SentencePiece's kind of BPE) or ``gpt2`` (byte-level BPE).
        pieces: Text of each token, one for each row of the embedding.
        kinds: NORMAL, CONTROL, ... of each.
        scores: Of ``llama`` alone: the pair whose merge has the highest is merged first.
        split: Of ``gpt2`` alone: llama.cpp's name for how text becomes words.
        add_space_prefix: Whether text begins as if after a space.
        notes: Where llama.cpp takes text otherwise than transformers, a sentence each.
    """

    model: str
    pieces: list[str]
    kinds: list[int]
    scores: list[float] = field(default_factory=list)
    split: str | None = None
    add_space_prefix: bool = False
    notes: list[str] = field(default_factory=list)


def build_vocabulary(tokenizer: PreTrainedTokenizerBase, *, rows: int) -> Vocabulary:
    """Describe a fast tokenizer for llama.cpp.

    Args:
        tokenizer: What ``load_tokenizer`` returned.
        rows: Rows of the model's embedding; those without a token get a name that no text has.

    Raises:
        ArtifactError: llama.cpp has no such tokenizer.
    """
    if not tokenizer.is_fast:
        _refuse(f"{type(tokenizer).__name__} has no tokenizer.json")
    data = describe_tokenizer(tokenizer)
    model = data["model"]
    if model["type"] != "BPE":
        _refuse(f"its kind is {model['type']}")
    pieces, kinds = _list_pieces(data, rows=rows)
    _refuse_changes(data)
    notes = list_notes(tokenizer, server="llama.cpp")
    if model.get("byte_fallback"):
        return Vocabulary(
            "llama",
            pieces,
            [BYTE if _BYTE_PIECE.fullmatch(p) else k for p, k in zip(pieces, kinds, strict=True)],
            scores=_compute_scores(pieces, model["merges"]),
            add_space_prefix=_adds_space(data),
            notes=notes,
        )
    missing = len(set(pre_tokenizers.ByteLevel.alphabet()) - model["vocab"].keys())
    if missing:
        notes.append(
            f"Its vocabulary lacks {missing} of the 256 bytes, which it reads as unknown tokens "
            "and llama.cpp leaves out."
        )
    return Vocabulary("gpt2", pieces, kinds, split=_name_split(data), notes=notes)


def _refuse(why: str) -> NoReturn:
    raise ArtifactError(
        f"llama.cpp has no tokenizer like this one: {why}. It takes BPE of SentencePiece's kind "
        "(LLaMA 1 and 2, Mistral) or of bytes (GPT-2, Llama 3, Qwen). Use `target=vllm` or "
        "`target=genai`."
    )


def _list_pieces(data: dict[str, Any], *, rows: int) -> tuple[list[str], list[int]]:
    pieces = [f"[PAD{row}]" for row in range(rows)]
    kinds = [UNUSED] * rows
    for piece, row in data["model"]["vocab"].items():
        pieces[row], kinds[row] = piece, NORMAL
    for token in data["added_tokens"]:
        row = token["id"]
        pieces[row] = token["content"]
        kinds[row] = CONTROL if token["special"] else USER_DEFINED
    unknown = data["model"].get("unk_token")
    if unknown in data["model"]["vocab"]:
        kinds[data["model"]["vocab"][unknown]] = UNKNOWN
    return pieces, kinds


def _compute_scores(pieces: list[str], merges: list[Any]) -> list[float]:
    """Turn the order of merges into scores, which is what SentencePiece has instead.

    Of the pairs that make the same piece the first counts: a tokenizer.json made from
    SentencePiece lists all of them, in the order of the pieces' scores.
    """
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    # What nothing merges into, such as a letter, is never asked for its score.
    return [-float(ranks.get(piece, len(merges))) for piece in pieces]


def _name_split(data: dict[str, Any]) -> str:
    steps = list_steps(data["pre_tokenizer"], "pretokenizers")
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        _refuse("its words are not split as in byte-level BPE")
    patterns = [step.get("pattern", {}).get("Regex") for step in steps[:-1]]
    # A ByteLevel step with its own pattern has GPT-2's.
    known = len(patterns) == (0 if steps[-1].get("use_regex", True) else 1)
    pattern = patterns[0] if patterns else None
    if not known or pattern not in _SPLITS:
        _refuse("its pattern of words has no name there")
    split = _SPLITS[pattern]
    if data["model"].get("ignore_merges", False) != (split == "llama-bpe"):
        _refuse("whether whole words go before merges is fixed by its pattern there")
    return split


def _adds_space(data: dict[str, Any]) -> bool:
    normalizers = list_steps(data["normalizer"], "normalizers")
    steps = list_steps(data["pre_tokenizer"], "pretokenizers")
    return any(step["type"] == "Prepend" and step["prepend"] == _SPACE for step in normalizers) or (
        any(step["type"] == "Metaspace" and step["prepend_scheme"] != "never" for step in steps)
    )


def _refuse_changes(data: dict[str, Any]) -> None:
    kinds = {step["type"] for step in list_steps(data["normalizer"], "normalizers")}
    if strange := kinds - _CHANGES:
        _refuse(f"it changes text by {', '.join(sorted(strange))} first")
