from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from llmc.kernels.ops import linear, quant_linear
from llmc.kernels.ops.quantized import FLOAT8, NF4, pack_nibbles

OUT, IN = 6, 32
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
def test_linear(check, dtype: torch.dtype, biased: bool):
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((2, 3, IN), (OUT, IN), (OUT,)))
    expected = np.einsum("bsi,oi->bso", x.double().numpy(), weight.double().numpy())
    if biased:
        expected += bias.double().numpy()
    check(linear, (x, weight, bias if biased else None), {}, expected)


def codes_of(scheme: str) -> tuple[torch.Tensor, np.ndarray, int]:
    """Return packed codes, their values before scaling, and the symmetric zero point."""
    if scheme == "int8":
        codes = torch.randint(-128, 128, (OUT, IN), dtype=torch.int8)
        return codes, codes.double().numpy(), 0
    if scheme in FLOAT8:
        weight = (100 * torch.randn(OUT, IN)).to(FLOAT8[scheme])
        return weight, weight.double().numpy(), 0
    codes = torch.randint(16, (OUT, IN))
    values = codes.double().numpy() if scheme == "int4" else np.array(NF4)[codes.numpy()]
    return pack_nibbles(codes), values, 8 if scheme == "int4" else 0


def spread(values: torch.Tensor | int, group: int) -> np.ndarray:
    """Expand one entry per group to one entry per input channel."""
    return np.repeat(np.asarray(values, dtype=np.float64).reshape(-1, IN // group), group, axis=1)


def exact_rounding(x: np.ndarray, activation: str, x_scale: float | None) -> np.ndarray:
    largest = {"int8": 127.0, "fp8": 448.0, "fp8_e5m2": 57344.0}[activation]
    # In float32, as in the op: with more precision another code may be the nearest.
    x = x.astype(np.float32)
    scale = np.abs(x).max(-1, keepdims=True) / np.float32(largest) if x_scale is None else np.float32(x_scale)
    codes = x / scale
    if activation == "int8":
        return np.clip(np.rint(codes), -128, 127).astype(np.float64) * scale
    smallest, mantissa = (-6, 3) if activation == "fp8" else (-14, 2)
    low = np.exp2(np.maximum(np.floor(np.log2(np.maximum(np.abs(codes), 1e-30))), smallest) - mantissa)
    return np.clip(np.rint(codes / low) * low, -largest, largest).astype(np.float64) * scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8", "fp8_e5m2", "nf4"])
@pytest.mark.parametrize("group", [IN, 8])
def test_quantized_weights(check, scheme: str, group: int, dtype: torch.dtype):
    weight, values, zero = codes_of(scheme)
    x, bias = torch.randn(2, 3, IN).to(dtype), torch.randn(OUT).to(dtype)
    scales = 0.01 + 0.01 * torch.rand(OUT, IN // group, dtype=torch.float64).to(dtype)
    expected = x.double().numpy() @ ((values - zero) * spread(scales.double(), group)).T + bias.double().numpy()
    check(quant_linear, (x, weight, scales, None, bias, scheme, group), {}, expected)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("group", [IN, 8])
@pytest.mark.parametrize("activation", ["none", "int8"])
def test_zero_points(check, scheme: str, group: int, activation: str):
    weight, values, _ = codes_of(scheme)
    low, high, kind = (-128, 128, torch.int8) if scheme == "int8" else (0, 16, torch.uint8)
    zeros = torch.randint(low, high, (OUT, IN // group), dtype=kind)
    x, scales = torch.randn(3, IN), 0.01 + 0.01 * torch.rand(OUT, IN // group)
    wide = x.double().numpy() if activation == "none" else exact_rounding(x.numpy(), activation, None)
    expected = wide @ ((values - spread(zeros, group)) * spread(scales, group)).T
    check(quant_linear, (x, weight, scales, zeros, None, scheme, group, activation), {}, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8", "fp8_e5m2"])
@pytest.mark.parametrize("group", [IN, 8])
@pytest.mark.parametrize("activation", ["int8", "fp8", "fp8_e5m2"])
@pytest.mark.parametrize("x_scale", [None, 0.013])
def test_quantized_activations(
    check, scheme: str, group: int, activation: str, x_scale: float | None, dtype: torch.dtype
):
    weight, values, zero = codes_of(scheme)
    x, bias = torch.randn(2, 3, IN).to(dtype), torch.randn(OUT).to(dtype)
    scales = 0.01 + 0.01 * torch.rand(OUT, IN // group)
    expected = exact_rounding(x.float().numpy(), activation, x_scale) @ ((values - zero) * spread(scales, group)).T
    static_scale = None if x_scale is None else torch.tensor(x_scale)
    args = (x, weight, scales, None, bias, scheme, group, activation, static_scale)
    check(quant_linear, args, {}, expected + bias.double().numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("scales_per_channel", [1, IN // 8])
@pytest.mark.parametrize("activation", ["none", "int8"])
def test_multiples(check, scheme: str, scales_per_channel: int, activation: str, dtype: torch.dtype):
    weight, values, zero = codes_of(scheme)
    multiples = torch.randint(-15, 16, (OUT, IN // 8), dtype=torch.int8)
    x, bias, scales = (
        torch.randn(3, IN).to(dtype),
        torch.randn(OUT).to(dtype),
        0.01 * torch.rand(OUT, scales_per_channel),
    )
    group_scales = spread(multiples, 8) * np.repeat(scales.double().numpy(), IN // scales_per_channel, axis=1)
    wide = x.double().numpy() if activation == "none" else exact_rounding(x.float().numpy(), activation, None)
    expected = wide @ ((values - zero) * group_scales).T + bias.double().numpy()
    check(quant_linear, (x, weight, scales, None, bias, scheme, 8, activation, None, multiples), {}, expected)


@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8", "fp8_e5m2", "nf4"])
def test_contract(contract, scheme: str):
    x, bias, weight = torch.randn(2, 3, IN).bfloat16(), torch.randn(OUT).bfloat16(), codes_of(scheme)[0]
    contract(quant_linear, (x, weight, torch.rand(OUT, 4), None, bias, scheme, 8))
    contract(quant_linear, (x.float(), weight, torch.rand(OUT, 1), None, None, scheme, IN, "int8"))
    contract(quant_linear, (x, weight, torch.rand(OUT, 4), None, bias, scheme, 8, "fp8", torch.tensor(0.01)))
    if scheme in ("int8", "int4"):
        zeros = torch.ones(OUT, 4, dtype=weight.dtype)
        contract(quant_linear, (x, weight, torch.rand(OUT, 4), zeros, None, scheme, 8, "int8"))
        multiples = torch.ones(OUT, 4, dtype=torch.int8)
        contract(quant_linear, (x, weight, torch.rand(OUT, 1), None, None, scheme, 8, "int8", None, multiples))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_contract_plain(contract, dtype: torch.dtype):
    x, weight, bias = torch.randn(2, 3, IN).to(dtype), torch.randn(OUT, IN).to(dtype), torch.randn(OUT).to(dtype)
    contract(linear, (x, weight))
    contract(linear, (x[0], weight, bias))


def test_an_int4_weight_with_multiples_equals_an_int8_weight():
    """Integer kernels compute with codes times multiples; the bits are the same."""
    weight, values, zero = codes_of("int4")
    multiples = torch.randint(-15, 16, (OUT, IN // 8), dtype=torch.int8)
    int8_weight = torch.from_numpy((values - zero) * spread(multiples, 8)).to(torch.int8)
    assert np.array_equal(int8_weight.double().numpy(), (values - zero) * spread(multiples, 8)), (
        "does not fit into int8"
    )
    x, scales = torch.randn(4, IN), 0.01 + 0.01 * torch.rand(OUT, 1)
    result = quant_linear(x, weight, scales, None, None, "int4", 8, "int8", multiples=multiples)
    assert torch.equal(result, quant_linear(x, int8_weight, scales, None, None, "int8", IN, "int8"))


@pytest.mark.parametrize("activation", ["none", "int8"])
@pytest.mark.parametrize("parameters", ["scales", "zeros", "multiples"])
def test_the_block_size_does_not_change_the_result(monkeypatch: pytest.MonkeyPatch, activation: str, parameters: str):
    weight, _, _ = codes_of("int4")
    x, bias, scales = torch.randn(2, 3, IN), torch.randn(OUT), 0.01 + 0.01 * torch.rand(OUT, IN // 8)
    zeros = torch.randint(16, (OUT, IN // 8), dtype=torch.uint8) if parameters == "zeros" else None
    multiples = torch.randint(-15, 16, (OUT, IN // 8), dtype=torch.int8) if parameters == "multiples" else None
    args = (x, weight, scales, zeros, bias, "int4", 8, activation, None, multiples)
    whole = quant_linear(*args)
    for channels in (1, 4):  # 4 does not divide OUT
        monkeypatch.setattr(sys.modules["llmc.kernels.ops.linear"], "BLOCK_WEIGHTS", channels * IN)
        torch.testing.assert_close(quant_linear(*args), whole)


def test_an_int8_kernel_returns_the_same_bits():
    """With so many input channels that the sums are not exact in float32."""
    x, weight = 0.8 + 0.2 * torch.rand(4, 4096), torch.randint(100, 128, (OUT, 4096), dtype=torch.int8)
    scales, bias = 0.01 + 0.01 * torch.rand(OUT, 1), torch.randn(OUT)
    step = x.abs().amax(1, keepdim=True) / 127
    rounded = torch.round(x / step).to(torch.int32)
    sums = rounded.numpy() @ weight.numpy().astype(np.int32).T
    kernel = sums.astype(np.float32) * scales.numpy().T * step.numpy() + bias.numpy()
    assert np.array_equal(quant_linear(x, weight, scales, None, bias, "int8", 4096, "int8").numpy(), kernel)
    assert np.abs(sums).max() > 2**24


def test_refusals():
    x, weight, scales = torch.randn(3, IN), torch.zeros(OUT, IN, dtype=torch.int8), torch.ones(OUT, 1)
    with pytest.raises(ValueError, match="int9"):
        quant_linear(x, weight, scales, None, None, "int8", IN, "int9")
    with pytest.raises(ValueError, match="int9"):
        quant_linear(x, weight, scales, None, None, "int9", IN)
    with pytest.raises(ValueError, match="x_scale"):
        quant_linear(x, weight, scales, None, None, "int8", IN, x_scale=torch.tensor(1.0))


@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8", "fp8_e5m2", "nf4"])
@pytest.mark.parametrize("activation", ["none", "int8", "fp8", "fp8_e5m2"])
@pytest.mark.parametrize("group", [IN, 8])
def test_tracing(traces, scheme: str, activation: str, group: int):
    weight, scales = codes_of(scheme)[0], torch.ones(OUT, IN // group)
    traces(
        lambda x: quant_linear(x, weight, scales, None, None, scheme, group, activation),
        (torch.randn(2, 5, IN),),
        (torch.randn(1, 1, IN),),
        ("BSi",),
    )


def test_tracing_plain(traces):
    weight, bias = torch.randn(OUT, IN), torch.randn(OUT)
    traces(lambda x: linear(x, weight, bias), (torch.randn(2, 5, IN),), (torch.randn(1, 1, IN),), ("BSi",))
