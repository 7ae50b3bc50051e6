from __future__ import annotations

from itertools import pairwise
from statistics import NormalDist

import numpy as np
import pytest
import torch

from llmc.kernels.ops.quantized import NF4, dequantize, pack_nibbles, round_activation, unpack_nibbles


def fp8_value(code: int) -> float:
    """e4m3fn by its definition: bias 7, no infinities, all ones is NaN."""
    sign, exponent, mantissa = -1.0 if code & 128 else 1.0, (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def test_the_low_nibble_comes_first():
    assert pack_nibbles(torch.tensor([[1, 15, 0, 8]])).tolist() == [[0xF1, 0x80]]
    assert unpack_nibbles(torch.tensor([[0xF1, 0x80]], dtype=torch.uint8)).tolist() == [[1, 15, 0, 8]]


def test_every_byte_survives_unpacking():
    packed = torch.arange(256, dtype=torch.uint8).view(4, 64)
    assert torch.equal(pack_nibbles(unpack_nibbles(packed)), packed)


def test_nf4_is_the_quantiles_of_the_normal_distribution():
    quantile, edge = NormalDist().inv_cdf, 0.9677083
    above = [quantile(p) for p in np.linspace(edge, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(edge, 0.5, 8)[:-1]]
    expected = np.array(sorted([*above, 0.0, *below])) / quantile(edge)
    np.testing.assert_allclose(NF4, expected, atol=1e-6)


def test_all_fp8_codes():
    weight = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(2, 128)
    scales = torch.tensor([[2.0], [3.0]])
    expected = torch.tensor([fp8_value(code) for code in range(256)]).view(2, 128) * scales
    assert torch.equal(dequantize(weight, scales, None, "fp8", 128).nan_to_num(999.0), expected.nan_to_num(999.0))


def test_all_int8_codes():
    weight = torch.arange(-128, 128).to(torch.int8).view(2, 128)
    scales = torch.tensor([[0.5, 2.0], [1.0, 3.0]])
    zeros = torch.tensor([[-128, 127], [5, -7]], dtype=torch.int8)
    symmetric, shifted = (dequantize(weight, scales, zero, "int8", 64) for zero in (None, zeros))
    for row, column in np.ndindex(2, 128):
        code, scale, zero = int(weight[row, column]), float(scales[row, column // 64]), int(zeros[row, column // 64])
        assert symmetric[row, column] == code * scale
        assert shifted[row, column] == (code - zero) * scale


@pytest.mark.parametrize(("scheme", "asymmetric"), [("int4", False), ("int4", True), ("nf4", False)])
def test_four_bit_codes(scheme: str, asymmetric: bool):
    codes = torch.randperm(64).view(2, 32) % 16
    scales = torch.tensor([[0.5, 2.0], [1.0, 3.0]])
    zeros = torch.tensor([[0, 15], [5, 8]], dtype=torch.uint8) if asymmetric else None
    actual = dequantize(pack_nibbles(codes), scales, zeros, scheme, 16)
    for row, column in np.ndindex(2, 32):
        code, group = int(codes[row, column]), column // 16
        zero = int(zeros[row, group]) if zeros is not None else 8
        value = np.float32(NF4[code]) if scheme == "nf4" else code - zero
        assert actual[row, column] == value * float(scales[row, group])


def test_refusals():
    weight, scales = torch.zeros(2, 8, dtype=torch.uint8), torch.ones(2, 1)
    with pytest.raises(ValueError, match="int3"):
        dequantize(weight, scales, None, "int3", 8)
    for scheme in ("fp8", "nf4"):
        with pytest.raises(ValueError, match="no zero"):
            dequantize(weight, scales, scales, scheme, 8)
    with pytest.raises(ValueError, match="int4"):
        round_activation(scales, "int4")


def nearest_even(value: float, grid: list[float]) -> float:
    """The nearest of the sorted grid; of two equally near, the one with the even index."""
    return min(enumerate(grid), key=lambda entry: (abs(entry[1] - value), entry[0] % 2))[1]


INT8_GRID = [float(code) for code in range(-128, 128)]
FP8_GRID = sorted({-value for value in map(fp8_value, range(127))} | set(map(fp8_value, range(127))))
# Zero has an even place in both, so an even index is an even code.
assert INT8_GRID.index(0.0) % 2 == FP8_GRID.index(0.0) % 2 == 0


@pytest.mark.parametrize(("activation", "grid"), [("int8", INT8_GRID), ("fp8", FP8_GRID)])
def test_a_row_is_rounded_by_its_largest_magnitude(activation: str, grid: list[float]):
    x = torch.randn(3, 40, dtype=torch.float64) * torch.tensor([[1.0], [100.0], [1e-4]])
    codes, scale = round_activation(x, activation)
    for row in range(3):
        step = max(abs(value) for value in x[row].tolist()) / grid[-1]
        assert scale[row] == pytest.approx(step, rel=1e-15)
        assert codes[row].tolist() == [nearest_even(value / step, grid) for value in x[row].tolist()]
        assert codes[row].abs().max() == grid[-1]


@pytest.mark.parametrize(("activation", "grid"), [("int8", INT8_GRID), ("fp8", FP8_GRID)])
def test_a_static_scale_saturates_and_halves_go_to_even(activation: str, grid: list[float]):
    middles = [(low + high) / 2 for low, high in pairwise(grid)]
    values = [*grid, *middles, -1e6, 1e6, 460.0]
    x, scale = torch.tensor(values) * 0.25, torch.tensor(0.25)
    codes, _ = round_activation(x, activation, scale)
    assert codes.tolist() == [nearest_even(value, grid) for value in values]


@pytest.mark.parametrize("activation", ["int8", "fp8"])
def test_a_row_of_zeros_is_zeros(activation: str):
    codes, scale = round_activation(torch.zeros(2, 8), activation)
    assert not codes.any() and (scale > 0).all()
