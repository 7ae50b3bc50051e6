"""Recipes: the options of a compilation in a file, and exceptions for single weights.

quantize = "int4"
algo = "gptq"

[[weights]]
name = "*.down_proj.weight"     # a pattern; if several match a weight, the last one counts
scheme = "int8"
group = 64

[[weights]]
name = "model.layers.0.*"
keep = true
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from ..errors import LlmcError, UsageError
from ..passes.quantize.schemes import Grid, Override
from .targets.registry import all_options

_GRID = {field.name for field in dataclasses.fields(Grid)}


def read_recipe(path: Path) -> dict[str, Any]:
    """Return keyword options for `compile` from a TOML or JSON file, with "overrides" among them.

    Raises:
        UsageError: RECIPE_INVALID, with the problem and its place.
    """
    document = _parse(path)
    weights = document.pop("weights", [])
    options = all_options()
    for name, value in document.items():
        if name not in options:
            raise _invalid(path, f"it has the key {name!r}", f"Known are {', '.join(options)}, and [[weights]].")
        try:
            options[name].check(value)
        except UsageError as error:
            raise _invalid(path, error.what.rstrip("."), error.hint) from None
    if not isinstance(weights, list) or not all(isinstance(entry, dict) for entry in weights):
        raise _invalid(path, "weights is not a list of tables", 'Write [[weights]], then name = "...".')
    return document | {"overrides": [_override(path, entry) for entry in weights]}


def _override(path: Path, entry: dict[str, Any]) -> Override:
    entry = dict(entry)
    name = entry.pop("name", None)
    if not isinstance(name, str):
        raise _invalid(path, "an entry of weights has no name", 'Add a pattern: name = "*.down_proj.weight".')
    if entry == {"keep": True}:
        return Override(name, None)
    if unknown := sorted(set(entry) - _GRID):
        raise _invalid(
            path, f"{name!r} has the key {unknown[0]!r}", f"Known are keep = true, and {', '.join(sorted(_GRID))}."
        )
    if "scheme" not in entry:
        raise _invalid(path, f"{name!r} has no scheme", 'Add scheme = "int8", or keep = true.')
    try:
        return Override(name, Grid(**entry))
    except LlmcError as error:
        raise _invalid(path, f"{name!r}: {error.what.rstrip('.')}", error.hint) from None


def _parse(path: Path) -> dict[str, Any]:
    try:
        content = path.read_text(encoding="utf-8")
        document = json.loads(content) if path.suffix.lower() == ".json" else _toml(path, content)
    except (OSError, ValueError) as error:  # both parsers' errors are ValueErrors
        raise _invalid(
            path, f"it can't be read: {error}", "Give a TOML or JSON file; see docs/quantization.md."
        ) from None
    if not isinstance(document, dict):
        raise _invalid(path, "it is not a table", "Give a TOML or JSON file; see docs/quantization.md.")
    return document


def _toml(path: Path, content: str) -> Any:
    if sys.version_info < (3, 11):
        raise _invalid(path, "this Python reads no TOML", "Write it as .json, or use Python 3.11 or newer.")
    import tomllib

    return tomllib.loads(content)


def _invalid(path: Path, what: str, hint: str) -> UsageError:
    return UsageError("RECIPE_INVALID", f"The recipe {str(path)!r} can't be used: {what}.", hint)
