from __future__ import annotations

import pytest
import torch

from llmc.kernels.ops import embedding, take_last

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 1, 2)])
def test_embedding(check, dtype: torch.dtype, shape: tuple[int, ...]):
    weight = torch.randn(7, 6).to(dtype)
    ids = torch.randint(7, shape)
    rows = [weight[int(token)].double() for token in ids.flatten()]
    check(embedding, (ids, weight), {}, torch.stack(rows).view(*shape, 6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tail", [(), (4,), (3, 4)])
def test_take_last(check, dtype: torch.dtype, tail: tuple[int, ...]):
    x = torch.randn(3, 5, *tail).to(dtype)
    check(take_last, (x,), {}, torch.stack([x[b, 4].double() for b in range(3)]).unsqueeze(1))
    lengths = torch.tensor([5, 1, 3])
    picked = [x[b, length - 1].double() for b, length in enumerate((5, 1, 3))]
    check(take_last, (x, lengths), {}, torch.stack(picked).unsqueeze(1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_contract(contract, dtype: torch.dtype):
    weight, x = torch.randn(7, 6).to(dtype), torch.randn(3, 5, 4).to(dtype)
    contract(embedding, (torch.randint(7, (2, 3)), weight))
    contract(embedding, (torch.randint(7, (4,)), weight))
    contract(take_last, (x,))
    contract(take_last, (x[:, :1],))
    contract(take_last, (x, torch.tensor([5, 1, 3])))


def test_take_last_is_no_view():
    x = torch.zeros(1, 1, 4)
    take_last(x).fill_(1)
    assert not x.any()


def test_tracing(traces):
    weight = torch.randn(7, 6)
    traces(lambda ids: embedding(ids, weight), (torch.randint(7, (2, 5)),), (torch.randint(7, (1, 1)),), ("BS",))
    large, small = torch.randn(2, 5, 6), torch.randn(1, 1, 6)
    traces(take_last, (large,), (small,), ("BSh",))
    traces(take_last, (large, torch.tensor([5, 2])), (small, torch.tensor([1])), ("BSh", "B"))
