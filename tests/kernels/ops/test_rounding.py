from __future__ import annotations

import numpy as np
import pytest
import torch

from llmc.kernels.ops import round_int4, round_int8
from llmc.kernels.ops.quantized import dequantize, unpack_nibbles
from llmc.kernels.ops.rounding import LARGEST_MULTIPLE

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Rows of zeros, of one weight, of weights of very different sizes.
SPECIAL = torch.tensor([[0.0] * 32, [0.0] * 9 + [-0.3] + [0.0] * 22, [2.0**-e for e in range(32)]])


def weights(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.cat([torch.randn(6, 32), 1e-6 * torch.randn(2, 32), SPECIAL]).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8(check, dtype: torch.dtype):
    weight = weights(dtype)
    codes, scales = [], []
    for row in weight.float().numpy():
        largest = np.abs(row).max()
        scales.append([largest / np.float32(127) if largest else np.float32(1)])
        codes.append(np.rint(row / scales[-1][0]))
    check(round_int8, (weight,), {}, (np.array(codes), np.array(scales, dtype=np.float64)))
    codes, scales = round_int8(weight)
    assert (codes.dtype, scales.dtype) == (torch.int8, torch.float32)
    assert codes.abs().amax(1).tolist() == [127] * 8 + [0, 127, 127]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [32, 16, 4])
def test_int4(check, group: int, dtype: torch.dtype):
    """By plain loops, in float32 as the op computes: which code is nearest must not depend on more."""
    weight = weights(dtype)
    rows, count = weight.shape[0], 32 // group
    codes, multiples, scales = np.zeros((rows, 32)), np.zeros((rows, count)), np.ones((rows, 1), dtype=np.float32)
    for r, row in enumerate(weight.float().numpy()):
        groups = row.reshape(count, group)
        wanted = [g[np.abs(g).argmax()] / np.float32(-8) for g in groups]
        if (largest := np.abs(wanted).max()) > 0:
            scales[r] = largest / np.float32(LARGEST_MULTIPLE)
        for i, g in enumerate(groups):
            multiples[r, i] = np.rint(wanted[i] / scales[r, 0]) or (-1 if wanted[i] < 0 else 1)
            step = scales[r, 0] * np.float32(multiples[r, i])
            codes[r, i * group : (i + 1) * group] = np.clip(np.rint(g / step), -8, 7) + 8
    check(round_int4, (weight, group), {}, (codes[:, 0::2] + 16 * codes[:, 1::2], scales, multiples))
    got, *_, multiple = round_int4(weight, group)
    assert (got.dtype, multiple.dtype) == (torch.uint8, torch.int8)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_weight_farthest_from_zero_is_exact_whichever_sign_it_has(sign: int):
    """Codes reach from -8 to 7: only one end of the grid is at the full distance."""
    weight = sign * torch.tensor([[0.8, 0.1, -0.7, 0.3, -0.25, 0.4, 0.2, 0.1]])
    codes, scales, multiples = round_int4(weight, 4)
    assert unpack_nibbles(codes)[0, [0, 5]].tolist() == [0, 0]
    assert multiples.tolist() == [[-15 * sign, -8 * sign]]
    back = dequantize(codes, scales, None, "int4", 4, multiples=multiples)
    assert torch.allclose(back[0, 0], weight[0, 0]) and (back - weight).abs().max() < 0.06


def test_a_group_that_is_small_beside_its_row_has_a_multiple_all_the_same():
    weight = torch.tensor([[1.0, 0.0, 1e-4, -1e-4, -1e-4, 1e-5, 0.0, 0.0]])
    _, _, multiples = round_int4(weight, 2)
    assert multiples.tolist() == [[-15, -1, 1, 1]]


@pytest.mark.parametrize("group", [32, 8])
def test_what_comes_back_is_near(group: int):
    weight = torch.randn(16, 32)
    codes, scales = round_int8(weight)
    assert ((dequantize(codes, scales, None, "int8", 32) - weight).abs() <= 0.501 * scales).all()
    codes, scales, multiples = round_int4(weight, group)
    back = dequantize(codes, scales, None, "int4", group, multiples=multiples)
    steps = (scales * multiples.abs()).repeat_interleave(group, 1)
    # Half a step; a step at the end without a code of its own, and what the multiple was rounded by at both ends.
    assert ((back - weight).abs() <= 1.001 * steps + 4 * scales).all()
    inside = (weight / (scales * multiples).repeat_interleave(group, 1)).abs() <= 7
    assert ((back - weight).abs() <= 0.501 * steps)[inside].all()


def test_codes_of_rounded_weights_are_theirs_again():
    """A weight that lies on the grid is not moved."""
    codes, scales = round_int8(torch.randn(4, 32))
    assert torch.equal(round_int8(dequantize(codes, scales, None, "int8", 32))[0], codes)
    codes, scales, multiples = round_int4(torch.randn(4, 32), 8)
    again = round_int4(dequantize(codes, scales, None, "int4", 8, multiples=multiples), 8)
    assert torch.equal(again[0], codes) and torch.equal(again[2], multiples)


def test_contract(contract):
    contract(round_int8, (weights(),))
    contract(round_int4, (weights(torch.bfloat16), 8))
