"""Compare the quantization of weights with plain loops.

The loops use float32, as the op does: with more precision another code may be the nearest.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from llmc.kernels.ops import round_weight, rounding
from llmc.kernels.ops.quantized import FLOAT8, NF4, dequantize, unpack_nibbles
from llmc.kernels.ops.rounding import (
    LARGEST_MULTIPLE,
    QuantizationParameters,
    codes_of,
    default_parameters,
    nearest,
    packed,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Output channels of zeros, of one nonzero weight, of very different magnitudes, and with one huge weight.
SPECIAL = torch.tensor([[0.0] * 32, [0.0] * 9 + [-0.3] + [0.0] * 22, [2.0**-e for e in range(32)], [3e4] + [0.01] * 31])
# (scheme, symmetric)
SCHEMES = [("int8", True), ("int4", True), ("int4", False), ("fp8", True), ("fp8_e5m2", True), ("nf4", True)]


def weights(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.cat([torch.randn(6, 32), 1e-6 * torch.randn(2, 32), SPECIAL]).to(dtype)


def grouped(weight: torch.Tensor, group: int) -> np.ndarray:
    return weight.float().numpy().reshape(len(weight), -1, group)


def nibbles(codes: np.ndarray) -> np.ndarray:
    return codes[:, 0::2] + 16 * codes[:, 1::2]


EMPTY = np.zeros((12, 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [32, 16, 4])
def test_int8(check: Callable[..., None], group: int, dtype: torch.dtype) -> None:
    groups = grouped(weight := weights(dtype), group)
    largest = np.abs(groups).max(2)
    scales = np.where(largest > 0, largest / np.float32(127), np.float32(1))
    codes = np.rint(groups / scales[..., None]).reshape(12, 32)
    check(round_weight, (weight, "int8", group), {}, (codes, scales.astype(np.float64), EMPTY, EMPTY))
    assert round_weight(weight, "int8", group)[0].dtype == torch.int8
    assert set(np.abs(codes.reshape(groups.shape)).max(2).flat) == {0, 127}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [32, 16, 4])
def test_int4(check: Callable[..., None], group: int, dtype: torch.dtype) -> None:
    groups = grouped(weight := weights(dtype), group)
    codes, scales, multiples = np.zeros((12, 32)), np.ones((12, 1), np.float32), np.zeros(groups.shape[:2])
    for o, channel in enumerate(groups):
        exact = [g[np.abs(g).argmax()] / np.float32(-8) for g in channel]
        if (largest := np.abs(exact).max()) > 0:
            scales[o] = largest / np.float32(15)
        for i, g in enumerate(channel):
            multiples[o, i] = np.rint(exact[i] / scales[o, 0]) or (-1 if exact[i] < 0 else 1)
            scale = scales[o, 0] * np.float32(multiples[o, i])
            codes[o, i * group : (i + 1) * group] = np.clip(np.rint(g / scale), -8, 7) + 8
    check(round_weight, (weight, "int4", group), {}, (nibbles(codes), scales, EMPTY, multiples))
    got, *_, multiple = round_weight(weight, "int4", group)
    assert (got.dtype, multiple.dtype) == (torch.uint8, torch.int8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [32, 16, 4])
def test_int4_with_zero_points(check: Callable[..., None], group: int, dtype: torch.dtype) -> None:
    groups = grouped(weight := weights(dtype), group)
    codes, scales = np.zeros((12, 32)), np.ones((12, 1), np.float32)
    zeros, multiples = np.zeros(groups.shape[:2]), np.zeros(groups.shape[:2])
    for o, channel in enumerate(groups):
        ranges = [(min(g.min(), np.float32(0)), max(g.max(), np.float32(0))) for g in channel]
        exact = [(high - low) / np.float32(15) for low, high in ranges]
        if max(exact) > 0:
            scales[o] = max(exact) / np.float32(8)
        for i, g in enumerate(channel):
            multiples[o, i] = max(1, np.rint(exact[i] / scales[o, 0]))
            scale = scales[o, 0] * np.float32(multiples[o, i])
            zeros[o, i] = np.clip(np.rint(-ranges[i][0] / scale), 0, 15)
            codes[o, i * group : (i + 1) * group] = np.clip(np.rint(g / scale) + zeros[o, i], 0, 15)
    check(round_weight, (weight, "int4", group, False), {}, (nibbles(codes), scales, zeros, multiples))
    assert [part.dtype for part in round_weight(weight, "int4", group, False)[2:]] == [torch.uint8, torch.int8]


@pytest.mark.parametrize("group", [32, 16, 4])
def test_nf4(check: Callable[..., None], group: int) -> None:
    groups = grouped(weight := weights(), group)
    largest = np.abs(groups).max(2)
    scales = np.where(largest > 0, largest, np.float32(1))
    distance = np.abs((groups / scales[..., None])[..., None] - np.array(NF4, np.float32))
    check(round_weight, (weight, "nf4", group), {}, (nibbles(distance.argmin(3).reshape(12, 32)), scales, EMPTY, EMPTY))


@pytest.mark.parametrize("scheme", FLOAT8)
@pytest.mark.parametrize("group", [32, 16, 0])
def test_float8(scheme: str, group: int) -> None:
    weight = weights()
    codes, scales, zeros, multiples = round_weight(weight, scheme, group)
    groups = grouped(weight, group or 32)
    largest = np.abs(groups).max(2) if group else np.full((12, 1), np.abs(groups).max())
    largest_code = np.float32({"fp8": 448, "fp8_e5m2": 57344}[scheme])
    expected = np.where(largest > 0, largest / largest_code, np.float32(1))
    assert np.array_equal(scales.numpy(), expected) and (zeros.shape, multiples.shape) == ((12, 0), (12, 0))
    levels = np.sort(torch.arange(256, dtype=torch.uint8).view(FLOAT8[scheme]).float().numpy())
    levels = levels[np.isfinite(levels)]
    distance = np.abs((groups / expected[..., None])[..., None] - levels).min(3).reshape(12, 32)
    spread = torch.from_numpy(expected).repeat_interleave(group or 32, 1)
    assert np.array_equal(np.abs(codes.float().numpy() - (weight / spread).numpy()), distance)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_int4_weight_farthest_from_zero_is_exact_for_both_signs(sign: int) -> None:
    """Codes minus 8 range from -8 to 7, so only -8 has the full magnitude."""
    weight = sign * torch.tensor([[0.8, 0.1, -0.7, 0.3, -0.25, 0.4, 0.2, 0.1]])
    codes, scales, _, multiples = round_weight(weight, "int4", 4)
    assert unpack_nibbles(codes)[0, [0, 5]].tolist() == [0, 0]
    assert multiples.tolist() == [[-15 * sign, -8 * sign]]
    back = dequantize(codes, scales, None, "int4", 4, multiples=multiples)
    assert torch.allclose(back[0, 0], weight[0, 0]) and (back - weight).abs().max() < 0.06


@pytest.mark.parametrize(("symmetric", "expected"), [(True, [-15, -1, 1, 1]), (False, [8, 1, 1, 1])])
def test_multiples_of_small_groups_are_not_zero(symmetric: bool, expected: list[int]) -> None:
    weight = torch.tensor([[1.0, 0.0, 1e-4, -1e-4, -1e-4, 1e-5, 0.0, 0.0]])
    assert round_weight(weight, "int4", 2, symmetric)[3].tolist() == [expected]


@pytest.mark.parametrize("sign", [1, -1])
def test_groups_of_one_sign_still_represent_zero(sign: int) -> None:
    codes, scales, zeros, multiples = round_weight(sign * (10 + torch.rand(2, 8)), "int4", 4, symmetric=False)
    assert set(zeros.flatten().tolist()) == {0 if sign > 0 else 15}
    back = dequantize(codes, scales, zeros, "int4", 4, multiples=multiples)
    assert (sign * back).min() > 9.5


def restored(weight: torch.Tensor, scheme: str, group: int, symmetric: bool) -> torch.Tensor:
    codes, scales, zeros, multiples = round_weight(weight, scheme, group, symmetric)
    args = (None if zeros.numel() == 0 else zeros, scheme, group or weight.shape[1], torch.float32)
    return dequantize(codes, scales, *args, None if multiples.numel() == 0 else multiples)


# Half the widest gap between two neighbouring values, relative to the largest value.
HALF_A_GAP = {"int8": 0.5 / 127, "fp8": 1 / 28, "fp8_e5m2": 1 / 14, "nf4": (1 - 0.6961928) / 2}


@pytest.mark.parametrize("group", [32, 8])
@pytest.mark.parametrize(("scheme", "symmetric"), SCHEMES)
def test_the_quantization_error_is_bounded(scheme: str, symmetric: bool, group: int) -> None:
    weight = torch.randn(64, 32)
    _, scales, _, multiples = round_weight(weight, scheme, group, symmetric)
    groups = weight.unflatten(1, (-1, group))
    error = (restored(weight, scheme, group, symmetric) - weight).unflatten(1, (-1, group)).abs().amax(2)
    if scheme != "int4":
        assert (error <= 1.001 * HALF_A_GAP[scheme] * groups.abs().amax(2)).all()
        return
    # Half a group scale (symmetric: a whole one, because +8 has no code), plus the rounding error of the multiple
    # at the largest code.
    group_scales = (scales * multiples).abs()
    assert (error <= 1.001 * (group_scales + 4 * scales if symmetric else 0.5 * group_scales + 7.5 * scales)).all()
    inside = (groups / (scales * multiples).unsqueeze(2)).abs().amax(2) <= 7
    assert not symmetric or (error <= 0.501 * group_scales)[inside].all()


@pytest.mark.parametrize(("scheme", "symmetric"), SCHEMES)
def test_requantizing_dequantized_codes_returns_the_codes(scheme: str, symmetric: bool) -> None:
    """True if every group contains the largest code, which determines its scale."""
    random = np.random.default_rng(0)
    for _ in range(20):
        channels, groups, group = random.integers(1, 9), random.integers(1, 9), 2 * int(random.integers(8, 40))
        codes, grid = on_grid(scheme, symmetric, (int(channels), int(groups), group))
        weight = dequantize(packed(codes, scheme), grid.scales, grid.zeros, scheme, group, multiples=grid.multiples)
        requantized, scales, zeros, multiples = round_weight(weight, scheme, group, symmetric)
        torch.testing.assert_close(scales, grid.scales, rtol=1e-6, atol=0)
        assert torch.equal(requantized.view(torch.uint8), packed(codes, scheme).view(torch.uint8))
        assert grid.zeros is None or torch.equal(zeros, grid.zeros)
        assert grid.multiples is None or torch.equal(multiples, grid.multiples)


def on_grid(scheme: str, symmetric: bool, shape: tuple[int, int, int]) -> tuple[torch.Tensor, QuantizationParameters]:
    """Return random unpacked codes [O, I] and scales.

    Every group contains the largest code, and every output channel the largest multiple.
    """
    channels, groups, _ = shape
    scales = 0.01 + torch.rand(channels, groups)
    zeros = multiples = None
    if scheme in FLOAT8:
        levels = torch.arange(256, dtype=torch.uint8).view(FLOAT8[scheme]).float()
        allowed = levels.isfinite().nonzero().flatten()
        ends = torch.tensor([0x7E, 0xFE] if scheme == "fp8" else [0x7B, 0xFB])
        codes = allowed[torch.randint(len(allowed), shape)]
        codes[..., 0] = ends[torch.randint(2, shape[:2])]
        return codes.to(torch.uint8).flatten(1).view(FLOAT8[scheme]), QuantizationParameters(scales)
    if scheme == "int8":
        codes = torch.randint(-127, 128, shape)
        codes[..., 0] = 127 * (2 * torch.randint(2, shape[:2]) - 1)
        return codes.to(torch.int8).flatten(1), QuantizationParameters(scales)
    codes = torch.randint(16, shape, dtype=torch.uint8)
    codes[..., 0] = 0  # the only code of the largest magnitude
    if scheme == "int4":
        scales = scales[:, :1]
        multiples = torch.randint(1, LARGEST_MULTIPLE[symmetric] + 1, shape[:2], dtype=torch.int8)
        multiples[:, 0] = LARGEST_MULTIPLE[symmetric]
        if symmetric:
            multiples *= 2 * torch.randint(2, shape[:2], dtype=torch.int8) - 1
        else:
            zeros = torch.randint(16, shape[:2], dtype=torch.uint8)
            codes[..., 1] = 15
    return codes.flatten(1), QuantizationParameters(scales, zeros, multiples)


@pytest.mark.parametrize(
    ("scheme", "symmetric", "group"), [*((*s, 32) for s in SCHEMES), ("fp8", True, 0), ("fp8_e5m2", True, 0)]
)
def test_zeros_remain_zeros_and_huge_weights_remain_finite(scheme: str, symmetric: bool, group: int) -> None:
    weight = torch.zeros(3, 32)
    weight[1] = 1e38 * torch.linspace(-1, 1, 32)
    weight[2, 5] = -1e-30
    back = restored(weight, scheme, group, symmetric)
    assert not back[0].any() and back.isfinite().all()
    assert back[1, 0] == pytest.approx(-1e38, rel=0.1)
    if group:
        assert back[2, 5] == pytest.approx(-1e-30, rel=1e-5) and back[2].count_nonzero() == 1


@pytest.mark.parametrize(("scheme", "symmetric"), SCHEMES)
def test_the_block_size_does_not_change_the_codes(
    monkeypatch: pytest.MonkeyPatch, scheme: str, symmetric: bool
) -> None:
    weight = weights()
    for group in (0, 8) if scheme in FLOAT8 else (8,):
        whole = round_weight(weight, scheme, group, symmetric)
        for channels in (1, 5):  # 5 does not divide 12
            with monkeypatch.context() as patched:
                patched.setattr(rounding, "BLOCK_WEIGHTS", channels * 32)
                for part, other in zip(round_weight(weight, scheme, group, symmetric), whole, strict=True):
                    assert part.dtype == other.dtype
                    assert torch.equal(part.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize(("scheme", "symmetric"), SCHEMES)
def test_codes_for_given_scales_are_the_nearest(scheme: str, symmetric: bool) -> None:
    """No other code has a nearer value. Calibration relies on this."""
    weight, group = torch.randn(5, 32), 8
    grid = default_parameters(weight, scheme, group, symmetric)
    grid = QuantizationParameters(grid.scales * 0.9, *grid[1:])  # some weights are beyond the largest code
    codes = codes_of(weight, grid, scheme, group)
    assert codes.shape == weight.shape
    got = dequantize(packed(codes, scheme), grid.scales, grid.zeros, scheme, group, multiples=grid.multiples)
    for code in range(256 if scheme in ("int8", *FLOAT8) else 16):
        if (scheme == "int8" and code == 128) or (scheme in FLOAT8 and not fp8(code, scheme).isfinite()):
            continue
        other = torch.full((5, 32), code, dtype=torch.uint8)
        other = other.view(codes.dtype)
        values = dequantize(packed(other, scheme), grid.scales, grid.zeros, scheme, group, multiples=grid.multiples)
        assert ((got - weight).abs() <= (values - weight).abs() + 1e-6).all()


def fp8(code: int, scheme: str) -> torch.Tensor:
    return torch.tensor(code, dtype=torch.uint8).view(FLOAT8[scheme]).float()


def test_ties_round_to_even() -> None:
    halves, one = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5]), torch.tensor(1.0)
    assert nearest(halves, one, None, "int8").tolist() == [0, 2, 2, 0, -2]
    assert nearest(halves, one, None, "int4").tolist() == [8, 10, 10, 8, 6]
    assert nearest(halves, one, torch.tensor(3, dtype=torch.uint8), "int4").tolist() == [3, 5, 5, 3, 1]
    assert nearest(torch.tensor([17.0, 19.0, 464.0]), one, None, "fp8").tolist() == [16.0, 20.0, 448.0]


@pytest.mark.parametrize("scheme", FLOAT8)
def test_float8_codes_saturate(scheme: str) -> None:
    """A cast saturates only in some versions of torch, so the values are clamped."""
    largest = {"fp8": 448.0, "fp8_e5m2": 57344.0}[scheme]
    values = [largest, largest + 1, largest * 1.036, largest * 1.1, 1e9, 1e38, float("inf"), float("nan")]
    for sign in (1, -1):
        codes = nearest(sign * torch.tensor(values), torch.tensor(1.0), None, scheme).float()
        assert codes[:-1].tolist() == [sign * largest] * 7 and codes[-1].isnan()


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_times_multiples_fit_in_int8(symmetric: bool) -> None:
    codes, _, zeros, multiples = round_weight(torch.randn(64, 32), "int4", 8, symmetric)
    assert multiples.abs().max() == LARGEST_MULTIPLE[symmetric]
    largest = 8 if symmetric else 15
    assert largest * LARGEST_MULTIPLE[symmetric] <= 127
    assert (
        unpack_nibbles(codes).unflatten(1, (-1, 8)).int() - (8 if symmetric else zeros.int().unsqueeze(2))
    ).abs().max() <= largest


def test_contract(contract: Callable[..., None]) -> None:
    for scheme, symmetric in SCHEMES:
        contract(round_weight, (weights(torch.bfloat16), scheme, 8, symmetric))
    contract(round_weight, (weights(), "fp8", 0))
