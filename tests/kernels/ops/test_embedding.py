from __future__ import annotations

import numpy as np
import pytest
import torch

from llmc.kernels.ops import embedding, quant_embedding, take_rows
from llmc.kernels.ops.quantized import NF4, pack_nibbles

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 1, 2)])
def test_embedding(check, dtype: torch.dtype, shape: tuple[int, ...]):
    weight = torch.randn(7, 6).to(dtype)
    ids = torch.randint(7, shape)
    vectors = [weight[int(token)].double() for token in ids.flatten()]
    check(embedding, (ids, weight), {}, torch.stack(vectors).view(*shape, 6))


VOCAB, WIDTH = 7, 16


def table(scheme: str, group: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Return packed codes, scales, and code values before zero points and scales."""
    codes = torch.randint(-128, 128, (VOCAB, WIDTH)) if scheme == "int8" else torch.randint(16, (VOCAB, WIDTH))
    scales = (0.01 + torch.rand(VOCAB, WIDTH // group)).to(dtype)
    packed = codes.to(torch.int8) if scheme == "int8" else pack_nibbles(codes)
    values = np.array(NF4)[codes.numpy()] if scheme == "nf4" else codes.double().numpy()
    return packed, scales, values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("group", [WIDTH, 4])
def test_quant_embedding(check, scheme: str, group: int, dtype: torch.dtype):
    codes, scales, values = table(scheme, group, dtype)
    values = (values - 8 * (scheme == "int4")) * np.repeat(scales.double().numpy(), group, axis=1)
    for shape in ((), (4,), (2, 3), (2, 1, 2)):
        ids = torch.randint(VOCAB, shape)
        check(quant_embedding, (ids, codes, scales, None, scheme, group), {}, values[ids.numpy()])


@pytest.mark.parametrize(("scheme", "kind", "high"), [("int8", torch.int8, 100), ("int4", torch.uint8, 16)])
def test_quant_embedding_with_zero_points(check, scheme: str, kind: torch.dtype, high: int):
    codes, scales, values = table(scheme, 4, torch.float32)
    zeros = torch.randint(high, (VOCAB, WIDTH // 4), dtype=kind)
    exact = (values - np.repeat(zeros.double().numpy(), 4, axis=1)) * np.repeat(scales.double().numpy(), 4, axis=1)
    ids = torch.tensor([[6, 0], [3, 3]])
    check(quant_embedding, (ids, codes, scales, zeros, scheme, 4), {}, exact[ids.numpy()])


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("zeros", [False, True])
def test_quant_embedding_with_multiples(check, scheme: str, zeros: bool):
    """One scale per token, and each group's multiple of it."""
    codes, scales, values = table(scheme, WIDTH, torch.float32)
    multiples = torch.randint(-15, 16, (VOCAB, WIDTH // 4), dtype=torch.int8)
    zero_points = torch.randint(16, (VOCAB, WIDTH // 4), dtype=codes.dtype) if zeros else None
    zero = np.repeat(zero_points.double().numpy(), 4, axis=1) if zero_points is not None else 8 * (scheme == "int4")
    exact = (values - zero) * np.repeat(multiples.double().numpy(), 4, axis=1) * scales.double().numpy()
    ids = torch.tensor([[6, 0], [3, 3]])
    check(quant_embedding, (ids, codes, scales, zero_points, scheme, 4, multiples), {}, exact[ids.numpy()])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tail", [(), (4,), (3, 4)])
def test_take_rows(check, dtype: torch.dtype, tail: tuple[int, ...]):
    x = torch.randn(3, 5, *tail).to(dtype)
    for indices in ([-1], [0, 4], [3, 3, -5, 1], [-2, 2], []):
        selected = [[x[b, i % 5].double().numpy() for i in indices] for b in range(3)]
        exact = np.stack(selected).reshape(3, len(indices), *tail)
        check(take_rows, (x, torch.tensor(indices, dtype=torch.int64)), {}, exact)


@pytest.mark.parametrize("index", [5, -6])
def test_an_index_out_of_range_is_refused(index: int):
    with pytest.raises((IndexError, RuntimeError)):
        take_rows(torch.randn(3, 5, 4), torch.tensor([index]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_contract(contract, dtype: torch.dtype):
    weight, x = torch.randn(VOCAB, 6).to(dtype), torch.randn(3, 5, 4).to(dtype)
    contract(embedding, (torch.randint(VOCAB, (2, 3)), weight))
    contract(embedding, (torch.randint(VOCAB, (4,)), weight))
    contract(take_rows, (x, torch.tensor([-1])))
    contract(take_rows, (x[:, :1], torch.tensor([0, -1])))
    for scheme in ("int8", "int4"):
        codes, scales, _ = table(scheme, 4, dtype)
        contract(quant_embedding, (torch.randint(VOCAB, (2, 3)), codes, scales, None, scheme, 4))
        multiples = torch.ones(VOCAB, WIDTH // 4, dtype=torch.int8)
        contract(quant_embedding, (torch.randint(VOCAB, (2, 3)), codes, scales[:, :1], None, scheme, 4, multiples))


def test_take_rows_returns_a_copy():
    x = torch.zeros(1, 1, 4)
    take_rows(x, torch.tensor([0])).fill_(1)
    assert not x.any()


def test_tracing(traces):
    weight = torch.randn(VOCAB, 6)
    many, one = (torch.randint(VOCAB, (2, 5)),), (torch.randint(VOCAB, (1, 1)),)
    traces(lambda ids: embedding(ids, weight), many, one, ("BS",))
    codes, scales, _ = table("int4", 4, torch.float32)
    traces(lambda ids: quant_embedding(ids, codes, scales, None, "int4", 4), many, one, ("BS",))
    large, small = torch.randn(2, 5, 6), torch.randn(1, 1, 6)
    traces(lambda x: take_rows(x, torch.tensor([-1, 0])), (large,), (small,), ("BSh",))


def test_the_number_of_selected_positions_is_dynamic(traces):
    """It depends neither on the batch size nor on the sequence length."""
    indices = torch.tensor([0, -1, 2]), torch.tensor([-1])
    traces(lambda rows: take_rows(torch.arange(24.0).view(2, 4, 3), rows), indices[:1], indices[1:], ("S",))
