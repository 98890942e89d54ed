"""Share what the measuring scripts have in common: a parser, a counter, and the JSON they write.

A script runs as a module from the root of the checkout: `python -m tools.measure.NAME`.
"""

import argparse
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lpdeploy.artifacts import save_json
from lpdeploy.machine import describe_machine


def build_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser that takes `--output` and shows the docstring of a script as it stands."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    return parser


def describe_command() -> str:
    """Return the running command; paths out of the checkout are cut to their last part."""
    spec = sys.modules["__main__"].__spec__
    script = ["-m", spec.name] if spec else [sys.argv[0]]
    outside = [Path(word).is_absolute() or ".." in Path(word).parts for word in sys.argv[1:]]
    pairs = zip(sys.argv[1:], outside, strict=True)
    words = [Path(word).name if cut else word for word, cut in pairs]
    return shlex.join(["python", *script, *words])


def save_measurement(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON document with the machine, the versions, the date and the command beside it."""
    machine = {**describe_machine().to_json(), "command": describe_command()}
    save_json(path, {**document, "machine": machine})


def report(done: int, total: int) -> None:
    """Show progress on stderr."""
    print(f"\r{done} of {total} ", end="", file=sys.stderr, flush=True)


def save_word_tokenizer(folder: Path, words: Iterable[str]) -> None:
    """Save a tokenizer with one token for each word beside a model; the first word is unknown."""
    vocabulary = {word: index for index, word in enumerate(words)}
    unknown = next(iter(vocabulary))
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unknown).save_pretrained(folder)
