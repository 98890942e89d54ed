"""JSON files, and the frozen dataclasses that are read from them.

Every JSON file is read here: bounded in size, and into a dataclass whose fields' types say what the
file may hold, so that a broken file gives one sentence. Standard library only.

JSON has no NaN and no infinity. Where a figure is one, the file holds the string ``"NaN"``,
``"Infinity"`` or ``"-Infinity"``, as Protocol Buffers write it, and a field of type ``float`` reads
it back.
"""

import json
import math
import stat
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from lpdeploy.errors import ArtifactError, quote_error

_MOST_BYTES = 1 << 30
"""The largest JSON of ours is the plan of a 65B model, with 20 MB."""
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_Record = TypeVar("_Record")


def format_json(data: Any, *, indent: int | None = 2) -> str:
    """Write ``data`` as the text of a JSON file, or of one line if ``indent`` is None."""
    try:
        text = json.dumps(data, indent=indent, allow_nan=False)
    except ValueError:
        text = json.dumps(_name_not_finite(data), indent=indent, allow_nan=False)
    return text + "\n"


def _name_not_finite(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _name_not_finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_name_not_finite(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return "NaN" if math.isnan(data) else "Infinity" if data > 0 else "-Infinity"
    return data


def parse_json(text: str | bytes) -> Any:
    """Read one JSON document.

    Raises:
        ValueError: The text is not JSON, is nested too deeply, or holds NaN or infinity, which
            Python's own reader would take.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}, which is no JSON number")


def load_text(path: Path, *, fix: str) -> str:
    """Read a file of text.

    Args:
        path: The file.
        fix: Sentence that tells the user what to do if the file is missing or broken.

    Raises:
        ArtifactError: It is missing, no regular file (a pipe would wait for ever), too large, not
            readable, or not UTF-8.
    """
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise ArtifactError(f"'{path}' is not a regular file. {fix}")
        if about.st_size > _MOST_BYTES:
            raise ArtifactError(
                f"'{path}' has {about.st_size:,} bytes; at most {_MOST_BYTES:,} are read. {fix}"
            )
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ArtifactError(f"No {path.name} in '{path.parent}'. {fix}") from None
    except OSError as error:
        raise ArtifactError(f"'{path}' cannot be read: {error.strerror}. {fix}") from error
    except UnicodeDecodeError as error:
        raise ArtifactError(f"'{path}' is not UTF-8 text ({quote_error(error)}). {fix}") from error


def load_json(path: Path, *, fix: str) -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        fix: Sentence that tells the user what to do if the file is missing or broken.

    Raises:
        ArtifactError: It is missing or not JSON; see ``load_text`` and ``parse_json``.
    """
    text = load_text(path, fix=fix)
    try:
        return parse_json(text)
    except ValueError as error:
        raise ArtifactError(f"'{path}' is not valid JSON ({quote_error(error)}). {fix}") from error


def load_record(
    kind: type[_Record], path: Path, *, fix: str, schema_version: int | None = None
) -> _Record:
    """Read a JSON file into a type; see ``read_value``.

    Args:
        kind: The type, a dataclass as a rule.
        path: The file.
        fix: Sentence that tells the user what to do if the file is missing or broken.
        schema_version: The version that the file must have; None if its format has none.

    Raises:
        ArtifactError: The file is missing, not JSON, of another version, or holds something else.
    """
    data = load_json(path, fix=fix)
    if schema_version is not None:
        found = data.get("schema_version") if isinstance(data, dict) else None
        if found != schema_version:
            raise ArtifactError(
                f"'{path}' has schema version {found!r:.40}; this lpdeploy reads {schema_version}. "
                f"{fix}"
            )
    try:
        return read_value(kind, data)
    except ValueError as error:
        raise ArtifactError(f"'{path}' cannot be used: {error}. {fix}") from error


def find_record(
    kind: type[_Record], path: Path, *, fix: str, schema_version: int | None = None
) -> _Record | None:
    """Read a file as ``load_record`` does; None where there is none."""
    if not path.is_file():
        return None
    return load_record(kind, path, fix=fix, schema_version=schema_version)


def load_record_lines(kind: type[_Record], path: Path, *, fix: str) -> list[tuple[str, _Record]]:
    """Read a file with one JSON document per line, as the lines and what they hold.

    A last line without its end, as a machine that lost power may leave, is not read.

    Raises:
        ArtifactError: The file is missing, or a line is not JSON or holds something else.
    """
    lines = load_text(path, fix=fix).split("\n")[:-1]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append((line, read_value(kind, parse_json(line))))
        except ValueError as error:
            raise ArtifactError(
                f"'{path}', line {number}, cannot be used: {error}. {fix}"
            ) from error
    return records


def read_record(
    kind: type[_Record], data: object, *, where: str = "", known: Mapping[str, object] | None = None
) -> _Record:
    """Build a dataclass from a JSON object.

    Keys that are no field are ignored, so that a later version may add some; a field with a
    default may be missing.

    Args:
        kind: The dataclass.
        data: What ``json`` read.
        where: The path of ``data`` in its file, for the error.
        known: Fields that have been read already, where a field is no key of its own.

    Raises:
        ValueError: A key without a default is missing, a value has the wrong type, or the
            dataclass refuses it; the message names it.
    """
    data = _check_object(data, where)
    values = dict(known or {})
    hints = get_type_hints(kind)
    for field in fields(kind):  # type: ignore[arg-type]
        if field.name in values:
            continue
        path = f"{where}.{field.name}" if where else field.name
        if field.name in data:
            values[field.name] = read_value(hints[field.name], data[field.name], where=path)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{path} is missing")
    return kind(**values)


def read_value(kind: Any, value: Any, *, where: str = "") -> Any:
    """Check a JSON value against a type, and build the dataclasses in it.

    A class with a method ``from_json`` is read by it. Others may be ``bool``, ``int``, ``float``,
    ``str``, ``None``, ``Any``, literals, unions, lists, tuples, mappings with names as keys, and
    dataclasses.

    Args:
        kind: The type.
        value: What ``json`` read.
        where: The path of ``value`` in its file, for the error.

    Raises:
        ValueError: The value has another type; the message names it.
    """
    if get_origin(kind) is not None:
        return _read_generic(get_origin(kind), get_args(kind), value, where)
    if hasattr(kind, "from_json"):
        return _read_by_own(kind, value, where)
    if is_dataclass(kind):
        return read_record(kind, value, where=where)  # type: ignore[arg-type]
    if kind is float and isinstance(value, str) and value in _NOT_FINITE:
        return _NOT_FINITE[value]
    if kind is not Any and not _is_instance(value, kind):
        raise _describe_mismatch(where, kind.__name__, value)
    return value


def _read_generic(origin: Any, inner: tuple[Any, ...], value: Any, where: str) -> Any:
    if origin in (Union, UnionType):
        return _read_union(inner, value, where)
    if origin in (list, tuple):
        return origin(_read_items(origin, inner, value, where))
    if origin is Literal:
        if value not in inner:
            raise _describe_mismatch(where, " or ".join(map(repr, inner)), value)
        return value
    items = _check_object(value, where).items()  # a dict or a Mapping
    return {key: read_value(inner[1], item, where=f"{where}.{key:.40}") for key, item in items}


def _read_by_own(kind: Any, value: Any, where: str) -> Any:
    try:
        return kind.from_json(_check_object(value, where))
    except ValueError as error:
        raise ValueError(f"in {where}, {error}" if where else str(error)) from None


def _check_object(data: object, where: str) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise _describe_mismatch(where, "an object", data)
    return data


def _is_instance(value: Any, kind: type) -> bool:
    # A bool is an int to Python, and an int is a good float.
    accepted = (int, float) if kind is float else kind
    return isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))


def _read_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    for option in options:
        try:
            return read_value(option, value, where=where)
        except ValueError:
            continue
    names = " or ".join("null" if o is type(None) else o.__name__ for o in options)
    raise _describe_mismatch(where, names, value)


def _read_items(origin: type, inner: tuple[Any, ...], value: Any, where: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise _describe_mismatch(where, "a list", value)
    any_length = origin is list or inner[-1] is Ellipsis
    kinds = [inner[0]] * len(value) if any_length else list(inner)
    if len(kinds) != len(value):
        raise _describe_mismatch(where, f"a list of {len(kinds)}", value)
    pairs = enumerate(zip(kinds, value, strict=True))
    return [read_value(kind, item, where=f"{where}[{i}]") for i, (kind, item) in pairs]


def _describe_mismatch(where: str, expected: str, value: object) -> ValueError:
    kinds = {dict: "an object", list: "a list", type(None): "null"}
    shown = kinds.get(type(value)) or repr(value)[:40]
    return ValueError(f"{where or 'the document'} is {shown}, not {expected}")
