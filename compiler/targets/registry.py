"""All targets by name: folders beside this file that have a `target.py`, and entry points of other packages."""

from __future__ import annotations

import importlib
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ..config import CompileConfig
from ..options import Declared, invalid, options_of
from .base import Target

DEFAULT_TARGET = "ort"
_GROUP = "llmc.targets"


@cache
def _built_in() -> dict[str, Target]:
    """Return the targets of the folders beside this file, by their names."""
    folders = sorted(path.parent.name for path in Path(__file__).parent.glob("*/target.py"))
    found = [importlib.import_module(f".{folder}.target", __package__).TARGET for folder in folders]
    return {target.name: target for target in found}


@cache
def _plugins() -> dict[str, metadata.EntryPoint]:
    return {found.name: found for found in metadata.entry_points(group=_GROUP)}


def target_names() -> list[str]:
    """Return the names of all targets, the default first."""
    names = {*_built_in(), *_plugins()}
    return sorted(names, key=lambda name: (name != DEFAULT_TARGET, name))


@cache
def find_target(name: str | None = None) -> Target:
    """Return a target by its name; the default one for None.

    Raises:
        UsageError: CONFIG_INVALID.
    """
    name = DEFAULT_TARGET if name is None else name
    if name in _built_in():
        return _built_in()[name]
    if name in _plugins():
        loaded: Target = _plugins()[name].load()
        return loaded
    raise invalid(f"target is {name!r}", f"Choose one of {', '.join(target_names())}.")


def all_options() -> dict[str, Declared]:
    """Return every option of a compilation by name: the common ones, then each target's own.

    A name means one thing: of targets with an option of the same name the first one's declaration is shown.
    """
    found = dict(options_of(CompileConfig))
    for name in target_names():
        for option, declared in options_of(find_target(name).options).items():
            found.setdefault(option, declared)
    return found


def make_config(**given: Any) -> CompileConfig:
    """Return a config of keyword options, those of the chosen target among them.

    Raises:
        UsageError: OPTION_UNKNOWN for a name that is no option; CONFIG_INVALID for a value that is refused.
    """
    target = find_target(given.get("target"))
    common = {*options_of(CompileConfig), "overrides"}
    own = options_of(target.options)
    for name in given:
        if name not in common and name not in own:
            raise _unknown(name, target)
    given = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    given["overrides"] = tuple(given.get("overrides", ()))
    config = CompileConfig(
        **{name: value for name, value in given.items() if name in common},
        target_options=target.options(**{name: value for name, value in given.items() if name in own}),
    )
    target.check(config)
    return config


def _unknown(name: str, target: Target) -> UsageError:
    for other in target_names():
        if name in options_of(find_target(other).options):
            return UsageError(
                "OPTION_UNKNOWN", f"{name} is an option of target {other}, not of {target.name}.", f"Leave out {name}."
            )
    known = ", ".join(all_options())
    return UsageError("OPTION_UNKNOWN", f"{name} is no option of a compilation.", f"There are {known}.")
