"""Tests of the shapes in optimization profiles."""

from __future__ import annotations

from llmc.compiler.targets.tensorrt.profiles import shapes_of
from llmc.runtimes.engines.tensorrt.section import Profile

PROFILES = {"decode": Profile(8, 1), "prefill": Profile(1, 512)}


def test_profiles_have_the_order_of_plans_whatever_the_manifest_has() -> None:
    assert [one.name for one in shapes_of(PROFILES)] == ["prefill", "decode"]
    assert [one.name for one in shapes_of(dict(reversed(PROFILES.items())))] == ["prefill", "decode"]


def test_each_input_gets_the_ranges_of_its_dimensions() -> None:
    prefill, decode = shapes_of(PROFILES)
    assert prefill.of_input("input_ids", (-1, -1)) == [(1, 1), (1, 512), (1, 512)]
    assert decode.of_input("input_ids", (-1, -1)) == [(1, 1), (1, 1), (8, 1)]
    assert prefill.of_input("rows", (-1,)) == [(1,), (1,), (512,)]
    assert decode.of_input("rows", (-1,)) == [(1,)] * 3
    assert decode.of_input("starts", (-1,)) == [(1,), (1,), (8,)]
    assert decode.of_input("past_key_values.0.key", (-1, 3, 2048, 64)) == [(1, 3, 2048, 64)] * 2 + [(8, 3, 2048, 64)]
