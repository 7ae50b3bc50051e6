"""Tensors from numbers and sizes, and arithmetic on sizes, equal torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from check_lowering import check
from torch import Tensor

from llmc.compiler.targets.onnx.aten import ATEN

aten = torch.ops.aten


def make(batch: int, length: int) -> tuple[Tensor]:
    generator = torch.Generator().manual_seed(10 * batch + length)
    return (torch.randn(batch, length, 6, generator=generator),)


def sizes(*values: Any) -> tuple[Tensor, ...]:
    return tuple(torch.full((2,), value) for value in values)


CASES: dict[str, Callable[[Tensor], Any]] = {
    "arange": lambda x: (
        torch.arange(x.shape[1]), torch.arange(2, x.shape[1] + 4, 2), torch.arange(x.shape[1], dtype=torch.float32),
        torch.arange(0, 1, 0.25), torch.arange(x.shape[1], 0, -1), torch.arange(5, dtype=torch.int32),
    ),
    "filled": lambda x: (
        torch.zeros(x.shape[0], 2), torch.ones(x.shape[1], dtype=torch.int64),
        torch.full((x.shape[1], x.shape[1]), -1.5),
        torch.zeros(2, 3, dtype=torch.bool), torch.full((), 3), x + torch.full((x.shape[1], 1), 7),
    ),
    "filled like another": lambda x: (
        torch.zeros_like(x), torch.ones_like(x, dtype=torch.int64), torch.full_like(x, 2.5), torch.zeros_like(x).bool(),
        x.new_zeros(2, x.shape[1]), x.new_ones(x.shape[0], dtype=torch.bool), x.new_full((x.shape[1],), float("-inf")),
        torch.where(x > 99, torch.empty_like(x), 0.0), torch.where(x[0, :, 0] > 99, x.new_empty(x.shape[1]), 0.0),
    ),
    "eye": lambda x: (torch.eye(3), torch.eye(x.shape[1]), torch.eye(2, x.shape[1], dtype=torch.int64)),
    "scalar": lambda x: (aten.scalar_tensor(2.5), aten.scalar_tensor(x.shape[1], dtype=torch.float32)),
    "sizes": lambda x: sizes(
        x.shape[1] + 3, x.shape[1] - x.shape[0], x.shape[0] * 2, x.shape[1] // 2, -x.shape[1] // 2, x.shape[1] // -3,
        x.shape[1] % 3, -x.shape[1] % 4, -x.shape[1], x.shape[1] ** 2,
    ),
    "sizes, divided": lambda x: sizes(x.shape[1] / 2 + 0.25, 2.0 * torch.sym_float(x.shape[1])),
    "sizes, minimum and maximum": lambda x: sizes(torch.sym_min(x.shape[1], 4), torch.sym_max(x.shape[0], 2)),
    "sizes, used as sizes": lambda x: (
        x.repeat(1, 3, 1)[:, : x.shape[1] * 2 + 1], x.new_ones(x.shape[1] // 2 + 1, x.shape[0] * 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_sources_equal_torch(name: str) -> None:
    check(CASES[name], make, ATEN)
