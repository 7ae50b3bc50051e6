"""The options of `llmc compile` that say what weights become, and how they and a recipe come together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

_SCHEMES = ["int8", "int4", "w8a8", "fp8", "nf4"]
_SHORT = ("int8", "int4", "fp8")
_ALGOS = ["rtn", "smoothquant", "awq", "gptq"]


def _group_size(context: click.Context, option: click.Parameter, given: str | None) -> int | str | None:
    if given is None or given == "channel":
        return given
    if not given.isdecimal():
        raise click.BadParameter(f"{given!r} is neither a number nor 'channel'.")
    return int(given)


_OPTIONS = [
    *(click.option(f"--{name}", is_flag=True, help=f"Short for --quantize {name}.") for name in _SHORT),
    click.option(
        "--quantize",
        type=click.Choice(_SCHEMES),
        help="int8, int4, nf4: weights; w8a8, fp8: weights and activations.",
    ),
    click.option("--algo", type=click.Choice(_ALGOS), help="What rounds the weights.  [default: the scheme's]"),
    click.option(
        "--group-size",
        metavar="N|channel",
        callback=_group_size,
        help="Weights that share a scale.  [default: the scheme's]",
    ),
    click.option(
        "--calib",
        metavar="F",
        help="The text to calibrate on: a text file, a .jsonl file, or a text of Python's own: docstrings, topics."
        "  [default: docstrings]",
    ),
    click.option("--calib-samples", type=click.IntRange(min=1), metavar="N", help="Its sequences.  [default: 16]"),
    click.option("--calib-length", type=click.IntRange(min=2), metavar="N", help="Tokens of each.  [default: 512]"),
    click.option(
        "--raise",
        "raise_share",
        type=click.FloatRange(0, 1),
        metavar="SHARE",
        help="In int4, give that share of the weights 8 bits.  [default: as many as a small loss takes]",
    ),
    click.option(
        "--round-prompts/--no-round-prompts",
        default=None,
        help="In int4, round the inputs of linears where a prompt runs, for integer kernels.  [default: do]",
    ),
    click.option(
        "--max-kl",
        type=click.FloatRange(min=0, min_open=True),
        metavar="X",
        help="In int4, give 8 bits to as few weights as a measured divergence under X takes.",
    ),
    click.option(
        "--ignore",
        multiple=True,
        metavar="PATTERN",
        help="Leave weights as they are: '*.layers.0.*'. May be given again.",
    ),
    click.option(
        "--config",
        "recipe",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        metavar="FILE",
        help="A recipe, TOML or JSON: choices as these, and what single weights become.",
    ),
]


def rounding_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options; `choices` makes keywords of `compile` from what they hold."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def choices(given: dict[str, Any]) -> dict[str, Any]:
    """Keywords for `compile`: those of the recipe, and before them those of the command line.

    Args:
        given: all options of the command by name, those left out as None; what isn't known here is a choice as it is.
    """
    given = dict(given)
    schemes = {name for name in _SHORT if given.pop(name)} | ({given["quantize"]} - {None})
    if len(schemes) > 1:
        raise click.UsageError(f"Weights are rounded once: choose one of {', '.join(sorted(schemes))}.")
    given["quantize"] = next(iter(schemes), None)
    recipe, ignored = given.pop("recipe"), given.pop("ignore")
    from ...passes.quantize.rounding_plan import Override
    from ..recipe import read_recipe

    found: dict[str, Any] = {"overrides": [], **(read_recipe(recipe) if recipe else {})}
    found.update({name: value for name, value in given.items() if value is not None})
    found["overrides"] = [*found["overrides"], *(Override(pattern, None) for pattern in ignored)]
    if "quantize" not in found:
        read = "prune" in found or "drop_layers" in found
        names = ["group_size", "algo", "raise_share", "round_prompts", "max_kl", *([] if read else ["calib"])]
        about = [name for name in names if name in found]
        if about or ignored:
            option = {"raise_share": "raise"}.get(about[0], about[0]) if about else "ignore"
            raise click.UsageError(
                f"--{option.replace('_', '-')} is about quantized weights: give --int8, --int4 or --quantize."
            )
    return found


def warn_of_float8(chosen: dict[str, Any]) -> None:
    """Say on stderr, before any work, which scheme no kernel of the target computes in.

    Args:
        chosen: keywords for `compile`.
    """
    if chosen.get("quantize") == "fp8":
        click.echo(
            f"No kernel of target {chosen['target']} computes in FP8 on a CPU: --fp8 is for checking quality there, "
            "and runs in float32. --quantize w8a8 is the scheme with 8-bit kernels for weights and inputs.",
            err=True,
        )
