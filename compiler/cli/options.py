"""Click options made from declarations: the options of a compilation are typed out nowhere else.

Declarations and targets are loaded when a command needs its options, so that other verbs start as fast without them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

from .command import Verb

if TYPE_CHECKING:
    from ..options import Declared


class DeclaredOption(click.Option):
    """A click option that knows its declaration, and with it its section of `--help`."""

    def __init__(self, declared: Declared) -> None:
        self.declared = declared
        option = declared.option
        flag = declared.flag
        names = [f"{flag}/--no-{flag[2:]}"] if declared.kinds == (bool,) else [flag]
        # None if not given, so that a recipe may say it; the declaration has the default.
        super().__init__(
            [*names, declared.name],
            type=None if declared.kinds == (bool,) else _Value(declared),
            default=None,
            help=_help(declared),
            metavar=option.metavar or None,
        )


class _Value(click.ParamType):
    """Reads a value as one of the types of its declaration, then checks it."""

    def __init__(self, declared: Declared) -> None:
        self.declared = declared
        self.name = "text"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str | None:
        choices = _choices(self.declared)
        return f"[{'|'.join(choices)}]" if choices else None

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(choice) for choice in _choices(self.declared) if choice.startswith(incomplete)]

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from ...errors import UsageError

        found = self._parse(value)
        choices = _choices(self.declared)
        if choices and found not in choices:
            self.fail(f"{value!r} is not one of {', '.join(choices)}.", param, ctx)
        try:
            self.declared.check(found)
        except UsageError as error:
            self.fail(error.hint, param, ctx)
        return found

    def _parse(self, value: Any) -> Any:
        for kind in (int, float):
            if kind in self.declared.kinds:
                try:
                    return kind(value)
                except ValueError:
                    continue
        return value


def _choices(declared: Declared) -> tuple[str, ...]:
    if declared.name != "target":
        return declared.option.choices
    from ..targets.registry import target_names

    return tuple(target_names())


def _help(declared: Declared) -> str:
    default = declared.option.default_text
    if not default and declared.name == "target":
        default = _choices(declared)[0]
    if not default and isinstance(declared.default, bool):
        name = declared.flag[2:]
        default = name if declared.default else f"no-{name}"
    if not default and declared.default not in (None, 0):
        default = str(declared.default)
    return f"{declared.option.help}  [default: {default}]" if default else declared.option.help


_NAMES = "__config_options__"


class ConfigVerb(Verb):
    """A verb with options of a compilation, which `with_options` names."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return all parameters; the options of a compilation come after the verb's own."""
        own = super().get_params(ctx)
        if not hasattr(self, "_declared"):
            names = getattr(self.callback, _NAMES)
            self._declared = [
                DeclaredOption(one) for name, one in _all_options().items() if names is None or name in names
            ]
        at = len(self.params)
        return [*own[:at], *self._declared, *own[at:]]


def with_options(*names: str) -> Callable[..., Any]:
    """Return a decorator that gives a `ConfigVerb` some options of a compilation; without names it gives all."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        setattr(function, _NAMES, names or None)
        return function

    return decorate


def given_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a compilation that were given on the command line."""
    return {name: value for name, value in values.items() if name in _all_options() and value is not None}


def _all_options() -> dict[str, Declared]:
    from ..targets.registry import all_options

    return all_options()
