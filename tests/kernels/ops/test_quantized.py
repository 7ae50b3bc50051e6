from __future__ import annotations

from itertools import pairwise
from statistics import NormalDist

import numpy as np
import pytest
import torch

from llmc.kernels.ops.quantized import FLOAT8, NF4, dequantize, pack_nibbles, quantize_activation, unpack_nibbles


def fp8_value(code: int) -> float:
    """Decode e4m3fn: bias 7, no infinities, NaN if all bits but the sign are ones."""
    sign, exponent, mantissa = -1.0 if code & 128 else 1.0, (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def fp8_e5m2_value(code: int) -> float:
    """Decode e5m2 by its definition: bias 15, infinities and NaN as in IEEE 754."""
    sign, exponent, mantissa = -1.0 if code & 128 else 1.0, (code >> 2) & 31, code & 3
    if exponent == 31:
        return float("nan") if mantissa else sign * float("inf")
    return sign * (mantissa / 4 * 2.0**-14 if exponent == 0 else (1 + mantissa / 4) * 2.0 ** (exponent - 15))


VALUES = {"fp8": fp8_value, "fp8_e5m2": fp8_e5m2_value}


def test_the_low_nibble_comes_first():
    assert pack_nibbles(torch.tensor([[1, 15, 0, 8]])).tolist() == [[0xF1, 0x80]]
    assert unpack_nibbles(torch.tensor([[0xF1, 0x80]], dtype=torch.uint8)).tolist() == [[1, 15, 0, 8]]


def test_packing_reverses_unpacking():
    packed = torch.arange(256, dtype=torch.uint8).view(4, 64)
    assert torch.equal(pack_nibbles(unpack_nibbles(packed)), packed)


def test_nf4_values_are_quantiles_of_the_normal_distribution():
    quantile, edge = NormalDist().inv_cdf, 0.9677083
    above = [quantile(p) for p in np.linspace(edge, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(edge, 0.5, 8)[:-1]]
    expected = np.array(sorted([*above, 0.0, *below])) / quantile(edge)
    np.testing.assert_allclose(NF4, expected, atol=1e-6)


@pytest.mark.parametrize("scheme", VALUES)
def test_all_float8_codes(scheme: str):
    weight = torch.arange(256, dtype=torch.uint8).view(FLOAT8[scheme]).view(2, 128)
    scales = torch.tensor([[2.0], [3.0]])
    expected = torch.tensor([VALUES[scheme](code) for code in range(256)]).view(2, 128) * scales
    actual = dequantize(weight, scales, None, scheme, 128)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_all_int8_codes():
    weight = torch.arange(-128, 128).to(torch.int8).view(2, 128)
    scales = torch.tensor([[0.5, 2.0], [1.0, 3.0]])
    zeros = torch.tensor([[-128, 127], [5, -7]], dtype=torch.int8)
    symmetric, shifted = (dequantize(weight, scales, zero, "int8", 64) for zero in (None, zeros))
    for o, i in np.ndindex(2, 128):
        code, scale, zero = int(weight[o, i]), float(scales[o, i // 64]), int(zeros[o, i // 64])
        assert symmetric[o, i] == code * scale
        assert shifted[o, i] == (code - zero) * scale


@pytest.mark.parametrize(("scheme", "asymmetric"), [("int4", False), ("int4", True), ("nf4", False)])
def test_four_bit_codes(scheme: str, asymmetric: bool):
    codes = torch.randperm(64).view(2, 32) % 16
    scales = torch.tensor([[0.5, 2.0], [1.0, 3.0]])
    zeros = torch.tensor([[0, 15], [5, 8]], dtype=torch.uint8) if asymmetric else None
    actual = dequantize(pack_nibbles(codes), scales, zeros, scheme, 16)
    for o, i in np.ndindex(2, 32):
        code, group = int(codes[o, i]), i // 16
        zero = int(zeros[o, group]) if zeros is not None else 8
        value = np.float32(NF4[code]) if scheme == "nf4" else code - zero
        assert actual[o, i] == value * float(scales[o, group])


def test_refusals():
    weight, scales = torch.zeros(2, 8, dtype=torch.uint8), torch.ones(2, 1)
    with pytest.raises(ValueError, match="int3"):
        dequantize(weight, scales, None, "int3", 8)
    for scheme in ("fp8", "fp8_e5m2", "nf4"):
        with pytest.raises(ValueError, match="no zero"):
            dequantize(weight, scales, scales, scheme, 8)
    with pytest.raises(ValueError, match="int4"):
        quantize_activation(scales, "int4")


def nearest_even(value: float, grid: list[float]) -> float:
    """Return the nearest value of a sorted grid; ties go to an even index from zero."""
    zero = grid.index(0.0)
    return min(enumerate(grid), key=lambda entry: (abs(entry[1] - value), (entry[0] - zero) % 2))[1]


INT8_GRID = [float(code) for code in range(-128, 128)]
FP8_GRID, E5M2_GRID = (sorted({v for v in map(value, range(256)) if abs(v) < 1e5}) for value in VALUES.values())
GRIDS = [("int8", INT8_GRID), ("fp8", FP8_GRID), ("fp8_e5m2", E5M2_GRID)]


@pytest.mark.parametrize(("activation", "grid"), GRIDS)
def test_the_scale_of_a_token_comes_from_its_largest_magnitude(activation: str, grid: list[float]):
    x = torch.randn(3, 40, dtype=torch.float64) * torch.tensor([[1.0], [100.0], [1e-4]])
    codes, scale = quantize_activation(x, activation)
    for token in range(3):
        expected = max(abs(value) for value in x[token].tolist()) / grid[-1]
        assert scale[token] == pytest.approx(expected, rel=1e-15)
        assert codes[token].tolist() == [nearest_even(value / expected, grid) for value in x[token].tolist()]
        assert codes[token].abs().max() == grid[-1]


@pytest.mark.parametrize(("activation", "grid"), GRIDS)
def test_values_beyond_a_static_scale_saturate_and_ties_round_to_even(activation: str, grid: list[float]):
    middles = [(low + high) / 2 for low, high in pairwise(grid)]
    values = [*grid, *middles, -1e6, 1e6, 449.0, 460.0, 464.0, 465.0, 61440.0, 1e9, float("inf"), -float("inf")]
    x, scale = torch.tensor(values) * 0.25, torch.tensor(0.25)
    codes, _ = quantize_activation(x, activation, scale)
    assert codes.tolist() == [nearest_even(min(max(value, grid[0]), grid[-1]), grid) for value in values]
    nan, _ = quantize_activation(torch.tensor([float("nan"), 1.0]), activation, scale)
    assert nan.isnan().tolist() == [True, False]


@pytest.mark.parametrize("activation", ["int8", "fp8", "fp8_e5m2"])
def test_zeros_remain_zeros(activation: str):
    codes, scale = quantize_activation(torch.zeros(2, 8), activation)
    assert not codes.any() and (scale > 0).all()
