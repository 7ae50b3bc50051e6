"""Reductions, softmax, sorting and products in ONNX Runtime equal torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from check_lowering import check
from torch import Tensor
from torch.nn import functional as F

from llmc.compiler.targets.onnx.aten import ATEN

aten = torch.ops.aten


def make(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Return floats and integers of both signs, [B, S, 6]; some integers are equal."""
    generator = torch.Generator().manual_seed(10 * batch + length)
    x = torch.randn(batch, length, 6, generator=generator)
    return x, torch.randint(-3, 3, x.shape, generator=generator)


def kernel(channels: int, width: int) -> Tensor:
    """Return the weights of a convolution, which the graph computes."""
    return torch.arange(channels * width, dtype=torch.float32).reshape(-1, 1, width).cos()


CASES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "sum": lambda x, i: (
        x.sum(), x.sum(-1), x.sum((0, 2), keepdim=True), i.sum(1), (i > 0).sum(-1), x.sum(-1, dtype=torch.float64),
    ),
    "mean": lambda x, i: (x.mean(), x.mean(-1, keepdim=True), x.mean((0, 1)), i.mean(-1, dtype=torch.float32)),
    "prod": lambda x, i: (x.prod(-1), i.prod(2, keepdim=True)),
    "extrema": lambda x, i: (x.amax(-1), x.amin((0, 2)), x.amax((0, 1), keepdim=True), i.amax(-1), x.max(), i.min()),
    "extrema of a dim": lambda x, i: (*x.max(-1), *x.min(1, keepdim=True), *i.max(2), *i.min(-1)),
    "extrema of two": lambda x, i: (torch.max(x, -x), torch.min(i, -i)),
    "arg": lambda x, i: (x.argmax(-1), x.argmin(1, keepdim=True), i.argmax(-1), x.argmax(), i.argmin(0)),
    "quantifiers": lambda x, i: (
        (x > 0).any(-1), (x > 9).any(), (i != 0).all(1, keepdim=True), i.any(-1), (i < 9).all(),
    ),
    "var": lambda x, i: (x.var(-1), x.var(-1, unbiased=False), x.std((0, 2), keepdim=True), x.var(1, correction=0)),
    "std": lambda x, i: (x.std(-1, unbiased=False), x.std(-1), torch.std(x, -1, correction=2), x.std()),
    "norm": lambda x, i: tuple(torch.linalg.vector_norm(x, p, -1) for p in (0, 1, 2, 3, float("inf"), float("-inf"))),
    "norm, shape": lambda x, i: (torch.linalg.vector_norm(x), torch.linalg.vector_norm(x, 2, (0, 2), True)),
    "cumsum": lambda x, i: (x.cumsum(-1), i.cumsum(1), (i > 0).cumsum(0), i.cumsum(-1, dtype=torch.float32)),
    "softmax": lambda x, i: (x.softmax(-1), x.softmax(1), i.softmax(-1, dtype=torch.float32), x.log_softmax(-1)),
    "softmax, wide": lambda x, i: x.softmax(-1, dtype=torch.float64),
    "logsumexp": lambda x, i: ((x * 100).logsumexp(-1), x.logsumexp((0, 2), keepdim=True)),
    "topk": lambda x, i: (*x.topk(3), *x.topk(2, -1, largest=False), *x.topk(6, 2), *x.topk(1, 1)),
    "topk, by a size": lambda x, i: torch.cat([x, x + 9], 1).topk(torch.sym_min(x.shape[1], 9), 1),
    "sort": lambda x, i: (*x.sort(-1), *x.sort(1, descending=True), x.argsort(-1)),
    "sort, stable": lambda x, i: (
        *i.sort(stable=True, dim=-1), *i.sort(stable=True, descending=True), i.argsort(dim=1, stable=True),
    ),
    "triangles": lambda x, i: (x.tril(), x.triu(1), x.tril(-1), i.triu(-2), (x > 0).tril(), x.tril(x.shape[1] - 2)),
    "matmul": lambda x, i: (
        x @ x.transpose(1, 2), x.matmul(x[0].t()), x @ x[0, 0], torch.bmm(x, x.transpose(1, 2)), x[0].mm(x[0].t()),
        i @ i.transpose(1, 2),
    ),
    "matmul, batches": lambda x, i: x.unflatten(2, (2, 3)).transpose(1, 2) @ x[:, None].transpose(2, 3)[:, :, :3],
    "addmm": lambda x, i: (
        torch.addmm(x[0, :, :1], x[0], x[0].t()), torch.addmm(x[0, :1, :1], x[0], x[0].t(), beta=0.5, alpha=2),
        torch.baddbmm(x[..., :1], x, x.transpose(1, 2), beta=2),
    ),
    "einsum": lambda x, i: (
        torch.einsum("bsd, btd -> bst", x, x), torch.einsum("bsd,d->bs", x, x[0, 0]),
        torch.einsum("...d,...d->...", x, x),
    ),
    "conv1d": lambda x, i: (
        F.conv1d(x.transpose(1, 2), kernel(6, 3), groups=6, padding=2),
        F.conv1d(x.transpose(1, 2), kernel(6, 1), x[0, 0], groups=6),
        F.conv1d(x.transpose(1, 2), kernel(12, 4), groups=6, padding=6, dilation=2, stride=2),
        F.conv1d(x[0].t(), kernel(6, 1), groups=6),
        aten.conv1d.padding(x.transpose(1, 2), kernel(6, 4), None, [1], "same", [1], 6),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_reductions_equal_torch(name: str) -> None:
    check(CASES[name], make, ATEN)
