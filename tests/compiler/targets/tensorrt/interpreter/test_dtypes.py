"""Rounding to the element types of TensorRT."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmc.compiler.targets.tensorrt.interpreter.dtypes import NUMPY, round_to, widen

TIES = np.array([1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 1.0625, 1.1875, -70000], np.float32)


@pytest.mark.parametrize(
    ("name", "torch_dtype"), [("HALF", torch.float16), ("BF16", torch.bfloat16), ("FLOAT", torch.float32)]
)
def test_floats_are_rounded_as_torch_does(name: str, torch_dtype: torch.dtype) -> None:
    values = np.append(TIES, np.random.default_rng(0).normal(0, 100, 1000)).astype(np.float32)
    with np.errstate(over="ignore"):
        rounded = round_to(values, NUMPY[name])
    assert rounded.dtype == NUMPY[name]
    np.testing.assert_array_equal(widen(rounded), torch.from_numpy(values).to(torch_dtype).float().numpy())


def test_float8_saturates() -> None:
    values = np.array([447, 449, 464, 465, 1e9, np.inf, -np.inf, np.nan, 1.0625, 1.1875], np.float32)
    rounded = widen(round_to(values, NUMPY["FP8"]))
    np.testing.assert_array_equal(rounded, [448, 448, 448, 448, 448, 448, -448, np.nan, 1, 1.25])


def test_halves_are_rounded_to_float8_once() -> None:
    values = np.random.default_rng(0).normal(0, 100, 1000).astype(np.float16)
    expected = torch.from_numpy(values.clip(-448, 448)).to(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(widen(round_to(values, NUMPY["FP8"])), expected)


@pytest.mark.parametrize("name", ["INT8", "UINT8", "INT4", "INT32", "INT64"])
def test_floats_to_integers_drop_the_fraction_and_saturate(name: str) -> None:
    bits, lowest = {
        "INT8": (7, -128),
        "UINT8": (8, 0),
        "INT4": (3, -8),
        "INT32": (31, -(2**31)),
        "INT64": (63, -(2**63)),
    }[name]
    values = np.array([1.9, -1.9, 3, 1e30, -1e30, np.nan, np.inf], np.float32)
    rounded = round_to(values, NUMPY[name])
    assert rounded.dtype == NUMPY[name]
    expected = [1, max(-1, lowest), 3, 2**bits - 1, lowest, 0, 2**bits - 1]
    assert rounded.astype(np.int64).tolist() == expected


def test_widening_keeps_integers_and_bools() -> None:
    for name in ("INT64", "INT32", "BOOL", "UINT8", "FLOAT"):
        assert widen(np.zeros(2, NUMPY[name])).dtype == NUMPY[name]
    for name in ("HALF", "BF16", "FP8", "INT4"):
        assert widen(np.zeros(2, NUMPY[name])).dtype == np.float32
