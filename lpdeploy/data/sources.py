"""Text and conversations: from a local file or folder, the Hugging Face hub, or memory."""

import difflib
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NoReturn

from lpdeploy.data.hub import HUB_SOURCES, HubSource
from lpdeploy.data.rows import FIELDS, Example, parse_row
from lpdeploy.errors import DataError, quote_error

_SEPARATOR_LINE = re.compile(r"^<\|endoftext\|>[ \t]*$", re.MULTILINE)
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True)
class Corpus:
    """The examples of one source: either all plain text or all conversations.

    Attributes:
        source: Name or path of the source.
        examples: The examples, without empty ones.
    """

    source: str
    examples: list[Example]

    @property
    def is_chat(self) -> bool:
        """Whether the examples are conversations, or instruction pairs, rather than documents."""
        return any(example.messages for example in self.examples)


def load_corpus(source: Any, *, split: str = "train") -> Corpus:
    """Read all documents or conversations of a source.

    Args:
        source: A local file (``.txt`` or other plain text with documents separated by a line
            ``<|endoftext|>``, ``.jsonl``, ``.json``, ``.parquet``), a folder of such files, a
            short name of ``HUB_SOURCES``, or a hub name ``owner/name``. Names may end in
            ``:split``, which wins over ``split``. A local source wins over the hub. Or rows in
            memory, such as a ``datasets.Dataset``, each a mapping as for ``parse_row``.
        split: ``train``, ``test`` (for a short name: the split to evaluate on), or another split
            of the hub's data set. Local sources and rows have no splits and are read whole.

    Raises:
        DataError: The source is unknown, unreadable or out of reach, a row lacks its fields, plain
            text and conversations are mixed, or all examples are empty.
    """
    name = name_source(source)
    found: Iterable[Example]
    if not _has_name(source):
        rows = enumerate(source)
        found = (parse_row(row, f"Row {number} of {name}") for number, row in rows)
    elif Path(name).exists():
        found = _load_local(Path(name))
    else:
        found = _load_hub(name, split)
    corpus = Corpus(name, [example for example in found if not example.is_empty])
    if not corpus.examples:
        raise DataError(
            f"'{name}' holds no text: it has no rows, or all are empty. Give another source."
        )
    if corpus.is_chat and not all(example.messages for example in corpus.examples):
        raise DataError(f"'{name}' mixes plain text and conversations. Put them in two sources.")
    return corpus


def _has_name(source: Any) -> bool:
    return isinstance(source, str | os.PathLike)


def name_source(source: Any) -> str:
    """Return the path or name of a source, or the fingerprint of rows in memory.

    Raises:
        DataError: The name is empty, which as a path would be the working folder.
    """
    if _has_name(source):
        if not os.fspath(source):
            raise DataError("The name of the data is empty. Give a file, a folder or a hub name.")
        return os.fspath(source)
    return f"dataset {_get_fingerprint(source) or 'in memory'}"


def check_source(source: Any) -> None:
    """Check the name of a source without reading it: a file must be there, a hub name possible.

    Raises:
        DataError: It can be neither.
    """
    name = name_source(source)
    if not _has_name(source):
        return
    if Path(name).exists():
        _list_files(Path(name))
    else:
        _find_hub(name, "train")


def compute_source_hash(source: Any, *, split: str = "train") -> str | None:
    """Hash what ``load_corpus`` would read, without parsing it.

    Returns:
        For a local source, the hash of its files. For the hub, a hash of datasets' fingerprint,
        which changes with the revision, configuration and split. For a ``datasets.Dataset``, its
        fingerprint. None for a stream of the hub and for other rows, which are not known yet.

    Raises:
        DataError: The source is unknown, unreadable or out of reach.
    """
    if not _has_name(source):
        return _get_fingerprint(source)
    name = name_source(source)
    path = Path(name)
    digest = hashlib.sha256()
    if path.exists():
        for file in _list_files(path):
            try:
                with file.open("rb") as stream:
                    own = hashlib.file_digest(stream, "sha256").hexdigest()
            except OSError as error:
                raise _describe_unreadable(file, error) from error
            digest.update(f"{file.suffix.lower()} {own}\n".encode())
        return digest.hexdigest()
    hub, wanted = _find_hub(name, split)
    fingerprint = _get_fingerprint(_open_hub(hub, wanted, source=name))
    if fingerprint is None:
        return None
    digest.update(f"{hub} {fingerprint}".encode())
    return digest.hexdigest()


def _get_fingerprint(rows: Any) -> str | None:
    # datasets has no public name for it. It changes with every transform of the rows.
    return getattr(rows, "_fingerprint", None)


def is_data_file(path: PurePath) -> bool:
    """Tell whether a file has a suffix that is read."""
    return path.suffix.lower() in _READERS


def _list_files(path: Path) -> list[Path]:
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in _READERS)
    known = ", ".join(_READERS)
    if not files:
        raise DataError(f"The folder '{path}' holds no data file. Put {known} files in it.")
    for file in files:
        if not file.is_file():  # a pipe, say, which can be read only once
            raise DataError(f"'{file}' is no regular file. Write the data to a file first.")
    if path.is_file() and path.suffix.lower() not in _READERS:
        raise DataError(f"'{path}' has the suffix '{path.suffix}', which is not read. Use {known}.")
    return files


def _load_local(path: Path) -> Iterator[Example]:
    for file in _list_files(path):
        yield from _READERS[file.suffix.lower()](file)


def read_text(path: Path) -> str:
    """Read a file of text, which must be UTF-8.

    Raises:
        DataError: It cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"'{path}' is not UTF-8 ({quote_error(error)}). Convert it to UTF-8."
        ) from error
    except OSError as error:
        raise _describe_unreadable(path, error) from error


def _describe_unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"'{path}' cannot be read ({quote_error(error)}). Check the file.")


def _read_documents(path: Path) -> Iterator[Example]:
    for document in _SEPARATOR_LINE.split(read_text(path)):
        # The newlines around a separator and at the end of the file belong to no document.
        yield Example(document.removeprefix("\n").removesuffix("\n"))


def _read_json(path: Path) -> Iterator[Example]:
    for where, row in read_json_rows(path):
        yield parse_row(row, where)


def read_json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield each row of a file of JSON lines, or of one JSON list, with its place in the file.

    Raises:
        DataError: The file cannot be read, or a line of it is not valid JSON.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        for number, row in enumerate(_parse_json(text, path), start=1):
            yield f"'{path}', row {number},", row
        return
    # Not splitlines(), which also splits at U+2028 and others that JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"'{path}', line {number},", _parse_json(line, path, line=number)


def _parse_json(text: str, path: Path, *, line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _describe_no_json(path, line + error.lineno - 1, error.msg) from error
    except (ValueError, RecursionError) as error:
        raise _describe_no_json(path, line, quote_error(error)) from error


def _describe_no_json(path: Path, line: int, reason: str) -> DataError:
    return DataError(
        f"'{path}', line {line}, is not valid JSON ({reason}). Write one object per line, or one "
        "list of objects."
    )


def _read_parquet(path: Path) -> Iterator[Example]:
    import pyarrow as pa  # type: ignore[import-untyped]
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            # Only the columns that are used, since others may be large; all of them if none is
            # known, so that the error can name them.
            columns = [name for name in file.schema_arrow.names if name in FIELDS]
            for batch in file.iter_batches(batch_size=1000, columns=columns or None):
                for row in batch.to_pylist():
                    number += 1
                    yield parse_row(row, f"'{path}', row {number},")
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"'{path}' is no readable parquet file ({quote_error(error)}). Copy it anew."
        ) from error


_READERS: dict[str, Callable[[Path], Iterable[Example]]] = {
    **dict.fromkeys((".txt", ".text", ".raw", ".tokens"), _read_documents),
    **dict.fromkeys((".jsonl", ".json"), _read_json),
    ".parquet": _read_parquet,
}


def _load_hub(source: str, split: str) -> Iterator[Example]:
    hub, wanted = _find_hub(source, split)
    rows = itertools.islice(_open_hub(hub, wanted, source=source), hub.max_rows.get(wanted))
    found = (
        parse_row(
            {"text": row.get(hub.column)} if hub.column in row else row,
            f"'{source}', row {number},",
        )
        for number, row in enumerate(rows, start=1)
    )
    with _explained(source):
        if hub.separator is None:
            yield from found
        else:
            yield Example(hub.separator.join(row.text for row in found))


def _find_hub(source: str, split: str) -> tuple[HubSource, str]:
    """Return how to read a data set of the hub, and which split of it."""
    name, _, given = source.partition(":")
    hub = HUB_SOURCES.get(name)
    if hub is None:
        if not _HUB_NAME.fullmatch(name) or Path(name).suffix.lower() in _READERS:
            _refuse_unknown(source)
        hub = HubSource(name)
    wanted = given or (hub.test_split if split == "test" else split)
    if wanted is None:
        raise DataError(
            f"'{name}' has no split to evaluate on. Use '{name}:train', or a local file of text "
            "that was not trained on."
        )
    return hub, wanted


def _open_hub(hub: HubSource, split: str, *, source: str) -> Any:
    import datasets

    with _explained(source):
        return datasets.load_dataset(hub.repository, split=split, **hub.options)


@contextmanager
def _explained(source: str) -> Iterator[None]:
    """Turn the errors of the hub's libraries into one sentence."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError  # of httpx or httpx2, whichever the hub uses

    try:
        yield
    except ConnectionError as error:
        raise DataError(
            f"The hub is out of reach for '{source}' ({quote_error(error)}). Check the network, or "
            "give a local file or folder."
        ) from error
    except (OSError, ValueError, RuntimeError, DatasetsError, HTTPError) as error:
        raise DataError(
            f"'{source}' is no file or folder here, and the hub does not give it "
            f"({quote_error(error)}). Check the name, the split and 'hf auth login'."
        ) from error


def _refuse_unknown(source: str) -> NoReturn:
    parent = Path(source).parent
    neighbours = [str(path) for path in parent.iterdir()] if parent.is_dir() else []
    near = difflib.get_close_matches(source, [*HUB_SOURCES, *neighbours])
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise DataError(
        f"No file, folder or data set is called '{source}'.{hint} Give a path, one of "
        f"{', '.join(HUB_SOURCES)}, or a hub name owner/name."
    )
