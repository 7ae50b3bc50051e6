"""From parsed JSON to dataclasses: every key and every type must be exactly what the dataclass declares."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any, Literal, TypeVar

T = TypeVar("T")


class DecodeError(ValueError):
    """A document that doesn't fit; the message names the place and the reason, without a full stop."""


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
    if missing := sorted(hints.keys() - value.keys()):
        raise DecodeError(f"{where} lacks {', '.join(missing)}")
    if unknown := sorted(value.keys() - hints.keys()):
        raise DecodeError(f"{where} has unknown keys: {', '.join(map(str, unknown))}")
    return {name: _decode(hint, value[name], f"{where}.{name}") for name, hint in hints.items()}


def _name(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    return {int: "a whole number", float: "a number", str: "text"}.get(kind) or str(kind).partition("[")[0]
