"""The code blocks of a document, and the commands in them."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# A form such as `lpdeploy package RUN|MODEL --target triton|genai` stands for many commands.
_FORM = re.compile(r"[A-Z]\|[A-Z]|[a-z]\|[a-z]")


def list_blocks(document: Path) -> list[tuple[str, str]]:
    """List the language, empty for a shell, and the text of each block."""
    text = document.read_text(encoding="utf-8")
    return [(match[1], match[2]) for match in _BLOCK.finditer(text)]


def list_commands(document: Path) -> Iterator[list[str]]:
    """List what is typed after `lpdeploy`; two blanks begin a remark."""
    for language, block in list_blocks(document):
        for line in block.replace("\\\n", "").splitlines() if not language else ():
            words = re.split(r"\s{2,}(?!--)", line.strip())[0]
            if words.startswith("lpdeploy ") and not _FORM.search(words):
                yield shlex.split(words)[1:]
