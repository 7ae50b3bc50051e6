"""Recipes: the choices of a compilation in a file, and what single weights become.

quantize = "int4"
algo = "gptq"

[[weights]]
name = "*.down_proj.weight"     # a pattern; of several that fit a weight the last one counts
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
from ..passes.quantize.rounding_plan import Grid, Override

# What a recipe may say beside its weights: keywords of `compile`.
CHOICES: dict[str, tuple[type, ...]] = {
    "algo": (str,), "calib": (str,), "calib_length": (int,), "calib_samples": (int,), "drop_layers": (int,),
    "group_size": (int, str), "kv_cache": (str,), "kv_cache_dtype": (str,), "max_kl": (float, int),
    "max_seq_len": (int,), "ops": (str,), "prune": (str, float), "prune_algo": (str,), "quantize": (str,),
    "raise_share": (float, int), "round_prompts": (bool,),
}  # fmt: skip
_GRID = {field.name for field in dataclasses.fields(Grid)}


def read_recipe(path: Path) -> dict[str, Any]:
    """Keywords for `compile` from a TOML or JSON file, the overrides among them.

    Raises:
        LlmcError: RECIPE_INVALID, with what is wrong and where.
    """
    document = _parse(path)
    weights = document.pop("weights", [])
    if unknown := sorted(set(document) - set(CHOICES)):
        raise _invalid(path, f"it says {unknown[0]!r}", f"It may say {', '.join(CHOICES)}, and [[weights]].")
    for name, value in document.items():
        if type(value) not in CHOICES[name]:
            wanted = " or ".join(kind.__name__ for kind in CHOICES[name])
            raise _invalid(path, f"{name} is {value!r}", f"It takes a value of type {wanted}.")
    if not isinstance(weights, list) or not all(isinstance(entry, dict) for entry in weights):
        raise _invalid(path, "weights is no list of tables", 'Write [[weights]], then name = "...".')
    return document | {"overrides": [_override(path, entry) for entry in weights]}


def _override(path: Path, entry: dict[str, Any]) -> Override:
    entry = dict(entry)
    name = entry.pop("name", None)
    if not isinstance(name, str):
        raise _invalid(path, "an entry of weights has no name", 'Write which: name = "*.down_proj.weight".')
    if entry == {"keep": True}:
        return Override(name, None)
    if unknown := sorted(set(entry) - _GRID):
        raise _invalid(path, f"{name!r} says {unknown[0]!r}", f"It may say keep = true, or {', '.join(sorted(_GRID))}.")
    if "scheme" not in entry:
        raise _invalid(path, f"{name!r} does not say what it becomes", 'Write scheme = "int8", or keep = true.')
    try:
        return Override(name, Grid(**entry))
    except LlmcError as error:
        raise _invalid(path, f"{name!r}: {error.what}", error.hint) from None


def _parse(path: Path) -> dict[str, Any]:
    try:
        content = path.read_text(encoding="utf-8")
        document = json.loads(content) if path.suffix.lower() == ".json" else _toml(path, content)
    except (OSError, ValueError) as error:  # both parsers' errors are ValueErrors
        raise _invalid(
            path, f"it can't be read: {error}", "Give a TOML or JSON file; see docs/quantization.md."
        ) from None
    if not isinstance(document, dict):
        raise _invalid(path, "it is no table", "Give a TOML or JSON file; see docs/quantization.md.")
    return document


def _toml(path: Path, content: str) -> Any:
    if sys.version_info < (3, 11):
        raise _invalid(path, "this Python reads no TOML", "Write it as .json, or use Python 3.11 or newer.")
    import tomllib

    return tomllib.loads(content)


def _invalid(path: Path, what: str, hint: str) -> LlmcError:
    return UsageError("RECIPE_INVALID", f"The recipe {str(path)!r} can't be used: {what}.", hint)
