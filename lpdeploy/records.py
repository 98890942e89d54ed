"""Read a frozen dataclass back from JSON, with every value checked against its field's type."""

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

_Record = TypeVar("_Record")


def read_record(
    kind: type[_Record], data: object, *, where: str = "", known: Mapping[str, object] | None = None
) -> _Record:
    """Build a dataclass from a JSON object.

    Keys that are no field are ignored, so that a later version may add some; a field with a
    default may be missing. Fields may be ``bool``, ``int``, ``float``, ``str``, ``None``, ``Any``,
    literals, unions, tuples, dicts with names as keys, and dataclasses.

    Args:
        kind: The dataclass.
        data: What ``json`` read.
        where: The path of ``data`` in its file, for the error.
        known: Fields that have been read already, where a field is no key of its own.

    Raises:
        ValueError: A key without a default is missing, or a value has the wrong type; the message
            names it.
    """
    if not isinstance(data, Mapping):
        raise _describe_mismatch(where or "the document", "an object", data)
    values = dict(known or {})
    hints = get_type_hints(kind)
    for field in fields(kind):  # type: ignore[arg-type]
        if field.name in values:
            continue
        path = f"{where}.{field.name}" if where else field.name
        if field.name in data:
            values[field.name] = _read_value(hints[field.name], data[field.name], path)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{path} is missing")
    return kind(**values)


def _read_value(hint: Any, value: Any, where: str) -> Any:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return _read_union(inner, value, where)
    if origin is tuple:
        return _read_tuple(inner, value, where)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _describe_mismatch(where, "an object", value)
        return {key: _read_value(inner[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is Literal:
        if value not in inner:
            raise _describe_mismatch(where, " or ".join(map(repr, inner)), value)
        return value
    if is_dataclass(hint):
        return read_record(hint, value, where=where)  # type: ignore[arg-type]
    if hint is not Any and not _is_instance(value, hint):
        raise _describe_mismatch(where, hint.__name__, value)
    return value


def _is_instance(value: Any, hint: type) -> bool:
    # A bool is an int to Python, and an int is a good float.
    accepted = (int, float) if hint is float else hint
    return isinstance(value, accepted) and (hint is bool or not isinstance(value, bool))


def _read_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    for option in options:
        try:
            return _read_value(option, value, where)
        except ValueError:
            continue
    names = " or ".join("null" if o is type(None) else o.__name__ for o in options)
    raise _describe_mismatch(where, names, value)


def _read_tuple(inner: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise _describe_mismatch(where, "a list", value)
    hints = [inner[0]] * len(value) if inner[-1] is Ellipsis else list(inner)
    if len(hints) != len(value):
        raise _describe_mismatch(where, f"a list of {len(hints)}", value)
    pairs = enumerate(zip(hints, value, strict=True))
    return tuple(_read_value(hint, item, f"{where}[{i}]") for i, (hint, item) in pairs)


def _describe_mismatch(where: str, expected: str, value: object) -> ValueError:
    kinds = {dict: "an object", list: "a list", type(None): "null"}
    shown = kinds.get(type(value)) or repr(value)[:40]
    return ValueError(f"{where} is {shown}, not {expected}")
