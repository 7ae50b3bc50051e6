"""Options as dataclass fields: each is declared once, with its default, choices, range and help.

The command line, recipes, `compile()` and the docs are derived from these declarations. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..errors import UsageError

_METADATA = "llmc"


@dataclass(frozen=True)
class Option:
    """The declaration of an option, beside its name, type and default.

    Attributes:
        help: one or two sentences for `--help`, without the default.
        choices: the values that it may have; empty for any of its type.
        default_text: the default in words, where the default itself says too little.
        section: heading of the group in `--help`.
        flag: without dashes, if it is not the name with dashes.
        metavar: placeholder of the value in `--help`.
        at_least, at_most: the range of a number, ends included.
        above: the range of a number, end excluded.
        words: for numbers: texts that may be given instead.
        hidden: True keeps it off the command line, which has its own way to say it.
    """

    help: str
    choices: tuple[str, ...] = ()
    default_text: str = ""
    section: str = ""
    flag: str = ""
    metavar: str = ""
    at_least: float = -math.inf
    at_most: float = math.inf
    above: float = -math.inf
    words: tuple[str, ...] = ()
    hidden: bool = False


@dataclass(frozen=True)
class Declared:
    """An option of a dataclass: its name, the types that its value may have, its default and its `Option`."""

    name: str
    kinds: tuple[type, ...]
    default: Any
    option: Option

    @property
    def flag(self) -> str:
        """The flag on the command line, with its dashes."""
        return "--" + (self.option.flag or self.name.replace("_", "-"))

    def check(self, value: Any) -> None:
        """Refuse a value of a wrong type, out of range, or not among the choices; None is the default.

        Raises:
            UsageError: CONFIG_INVALID.
        """
        option = self.option
        if value is None or value in option.words:
            return
        if type(value) is int and float in self.kinds:
            value = float(value)
        # If some words may stand for a number, no other text may.
        kinds = [kind for kind in self.kinds if not (option.words and kind is str)]
        if type(value) not in kinds:
            wanted = [*(_TYPE_NAMES.get(kind, kind.__name__) for kind in kinds), *map(repr, option.words)]
            raise invalid(f"{self.name} is {value!r}", f"Give {' or '.join(wanted)}.")
        if option.choices and value not in option.choices:
            raise invalid(f"{self.name} is {value!r}", f"Choose one of {', '.join(option.choices)}.")
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not self._in_range(value):
            raise invalid(f"{self.name} is {value:g}", f"Give {self._range}.")

    def _in_range(self, value: float) -> bool:
        option = self.option
        return option.at_least <= value <= option.at_most and value > option.above

    @property
    def _range(self) -> str:
        option = self.option
        if option.at_least > -math.inf and option.at_most < math.inf:
            return f"{option.at_least:g} to {option.at_most:g}"
        return f"a number above {option.above:g}" if option.above > -math.inf else f"{option.at_least:g} or more"


_TYPE_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def option(default: Any, help: str, **more: Any) -> Any:
    """Return a dataclass field for an option; `more` as in `Option`."""
    return dataclasses.field(default=default, metadata={_METADATA: Option(help, **more)})


@cache
def options_of(kind: type) -> dict[str, Declared]:
    """Return the options that a dataclass declares, by name, in order."""
    hints = typing.get_type_hints(kind)
    return {
        field.name: Declared(field.name, tuple(_kinds(hints[field.name])), field.default, field.metadata[_METADATA])
        for field in dataclasses.fields(kind)
        if _METADATA in field.metadata
    }


def _kinds(hint: Any) -> Iterator[type]:
    if typing.get_origin(hint) is typing.Literal:
        yield from {type(value) for value in typing.get_args(hint)}
    elif isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        for part in typing.get_args(hint):
            yield from _kinds(part)
    elif hint is not type(None):
        yield hint


def check_options(config: Any) -> None:
    """Check each option of a dataclass instance by itself.

    Raises:
        UsageError: CONFIG_INVALID.
    """
    kind: type = type(config)
    for declared in options_of(kind).values():
        value = getattr(config, declared.name)
        if value is None and declared.default is not None:
            raise invalid(f"{declared.name} is None", "Leave it out for the default.")
        declared.check(value)


def invalid(what: str, hint: str) -> UsageError:
    """Return the refusal of an option's value or of a combination of options."""
    return UsageError("CONFIG_INVALID", f"{what}.", hint)
