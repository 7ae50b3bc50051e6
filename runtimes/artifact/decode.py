"""Between dataclasses and parsed JSON: every key and every type must be exactly what the dataclass declares.

A document has a key for each field. Only fields declared with `left_out` are missing where they have their default.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import field, fields, is_dataclass
from typing import Any, Literal, TypeVar

T = TypeVar("T")

_LEFT_OUT = "left out"


class DecodeError(ValueError):
    """A document that doesn't fit; the message names the place and the reason, without a full stop."""


def left_out(default: Any) -> Any:
    """Return a dataclass field that documents lack where it has its default.

    With such a field, documents that don't need it stay as they were before it was declared.
    """
    return field(default=default, metadata={_LEFT_OUT: True})


def encode(value: Any) -> Any:
    """Return the document of a dataclass instance, as `decode` reads it."""
    if is_dataclass(value):
        given = {one.name: getattr(value, one.name) for one in fields(value)}
        omitted = {one.name for one in fields(value) if one.metadata.get(_LEFT_OUT) and given[one.name] == one.default}
        return {name: encode(item) for name, item in given.items() if name not in omitted}
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    return value


def decode(kind: type[T], value: Any, where: str) -> T:
    """Return `value` as an instance of a dataclass.

    Args:
        where: what the document is called in messages.

    Raises:
        DecodeError: a key is missing or unknown, or a value has another type.
    """
    decoded: T = _decode(kind, value, where)
    return decoded


def _decode(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if is_dataclass(kind):
        assert isinstance(kind, type)
        return kind(**_decode_keys(kind, value, where))
    if origin in (typing.Union, types.UnionType):
        some = next(a for a in arguments if a is not type(None))
        return None if value is None else _decode(some, value, where)
    if origin is list and isinstance(value, list):
        return [_decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: _decode(arguments[1], item, f"{where}[{key!r}]") for key, item in value.items()}
    if origin is Literal and value in arguments:
        return value
    if kind is float and type(value) is int:
        return float(value)
    # To Python a bool is an int; to JSON it is not.
    if kind is Any or (isinstance(kind, type) and type(value) is kind):
        return value
    raise DecodeError(f"{where} is {value!r:.60}, not {_name(kind)}")


def _decode_keys(kind: type, value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise DecodeError(f"{where} is {value!r:.60}, not an object")
    hints = typing.get_type_hints(kind)
    optional = {one.name for one in fields(kind) if one.metadata.get(_LEFT_OUT)}
    if missing := sorted(hints.keys() - optional - value.keys()):
        raise DecodeError(f"{where} lacks {', '.join(missing)}")
    if unknown := sorted(value.keys() - hints.keys()):
        raise DecodeError(f"{where} has unknown keys: {', '.join(map(str, unknown))}")
    return {name: _decode(hint, value[name], f"{where}.{name}") for name, hint in hints.items() if name in value}


def _name(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    return {int: "a whole number", float: "a number", str: "text"}.get(kind) or str(kind).partition("[")[0]
