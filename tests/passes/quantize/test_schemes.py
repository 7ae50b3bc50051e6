"""Grids and schemes that make no sense are refused, and a scheme adapts to the model and the options."""

from __future__ import annotations

from typing import Any

import pytest

from llmc.errors import UsageError
from llmc.passes.quantize.schemes import Grid, Scheme

WIDE = Grid("int8", 128)


# Grids --------------------------------------------------------------------------------------------------------------


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown scheme": ({"scheme": "int3"}, "Scheme is 'int3'"),
    "an unknown format of inputs": ({"scheme": "int8", "activation": "int4"}, "Activation is 'int4'"),
    "groups that are no power of two": ({"scheme": "int8", "group": 48}, "groups of 48"),
    "groups of one": ({"scheme": "int8", "group": 1}, "groups of 1"),
    "groups of none": ({"scheme": "int4", "group": 0}, "groups of 0"),
    "a group that is a truth value": ({"scheme": "int8", "group": True}, "groups of True"),
    "a group in another word": ({"scheme": "fp8", "group": "row"}, "groups of 'row'"),
    "int4 without groups": ({"scheme": "int4"}, "groups of 'channel'"),
    "nf4 without groups": ({"scheme": "nf4", "group": "channel"}, "groups of 'channel'"),
    "integers with one scale": ({"scheme": "int8", "group": "tensor"}, "groups of 'tensor'"),
    "floats with zero points": ({"scheme": "fp8", "symmetric": False}, "zero points"),
    "levels with zero points": ({"scheme": "nf4", "group": 64, "symmetric": False}, "zero points"),
    "a static scale of exact inputs": ({"scheme": "int8", "static": True}, "inputs are not quantized"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_invalid_grids_are_refused(name: str) -> None:
    arguments, what = REFUSED[name]
    with pytest.raises(UsageError, match=what) as caught:
        Grid(**arguments)
    assert caught.value.code == "SCHEME_INVALID" and caught.value.hint


@pytest.mark.parametrize(
    "arguments",
    [
        {"scheme": "int8"},
        {"scheme": "int8", "group": 2048},
        {"scheme": "int8", "group": 64, "symmetric": False},
        {"scheme": "int4", "group": 2, "symmetric": False},
        {"scheme": "nf4", "group": 64},
        {"scheme": "fp8", "group": "tensor", "activation": "fp8", "static": True},
        {"scheme": "fp8_e5m2", "group": "channel", "activation": "int8"},
    ],
    ids=str,
)
def test_a_grid_is_not_limited_to_the_groups_of_one_target(arguments: dict[str, Any]) -> None:
    grid = Grid(**arguments)
    assert {name: getattr(grid, name) for name in arguments} == arguments


# Schemes ------------------------------------------------------------------------------------------------------------


SMALL = Grid("int4", 32, symmetric=False)
INT4 = Scheme("int4", Grid("int4", 128), WIDE, SMALL, small_below=1000, group_sizes=(128, 32))


@pytest.mark.parametrize(("numbers", "grid"), [(0, SMALL), (999, SMALL), (1000, INT4.linears), (10**12, INT4.linears)])
def test_a_small_model_has_a_grid_of_its_own(numbers: int, grid: Grid) -> None:
    chosen = INT4.of_size(numbers)
    assert chosen.linears == grid
    assert (chosen.name, chosen.wide, chosen.group_sizes) == (INT4.name, WIDE, (128, 32))


def test_a_scheme_without_a_grid_for_small_models_is_the_same_for_all() -> None:
    scheme = Scheme("int8", Grid("int8", 128), WIDE, small_below=1000)
    assert scheme.of_size(1) == scheme.of_size(1000) == scheme


@pytest.mark.parametrize("numbers", [1, 1000])
def test_another_group_holds_for_models_of_every_size(numbers: int) -> None:
    changed = INT4.with_group(64).of_size(numbers)
    assert (changed.linears, changed.wide) == (Grid("int4", 64), WIDE)
    assert INT4.linears == Grid("int4", 128), "the scheme itself does not change"


def test_another_group_must_be_one_that_the_format_can_have() -> None:
    assert Scheme("int8", Grid("int8", 128)).with_group("channel").linears == Grid("int8", "channel")
    with pytest.raises(UsageError, match="Int4 has groups of 'channel'"):
        INT4.with_group("channel")


def test_a_grid_must_have_groups_of_the_target() -> None:
    for grid in (Grid("int4", 128), Grid("nf4", 32), Grid("int8", "channel"), Grid("fp8", "tensor")):
        INT4.check(grid)
    with pytest.raises(UsageError, match="Int4 has groups of 64") as caught:
        INT4.check(Grid("int4", 64))
    assert caught.value.code == "SCHEME_INVALID" and "128, 32" in caught.value.hint
