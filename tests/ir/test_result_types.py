"""Types of results: as the op gives them, and inferred once for each kind of call."""

from __future__ import annotations

from typing import Any

import torch

from llmc.ir.result_types import TensorType, result_types

aten = torch.ops.aten
FLOATS = TensorType((4, 6), torch.float32)


def test_all_results_have_the_types_that_the_op_gives() -> None:
    got = result_types(aten.split_with_sizes.default, (FLOATS, [1, 5], 1), {})
    assert got == [TensorType((4, 1), torch.float32), TensorType((4, 5), torch.float32)]
    got = result_types(aten.cat.default, ([FLOATS, FLOATS], 1), {})
    assert got == [TensorType((4, 12), torch.float32)]
    got = result_types(aten.full.default, ([3], 1.0), {"dtype": torch.int8, "device": "cpu"})
    assert got == [TensorType((3,), torch.int8)]


def test_equal_numbers_of_other_types_are_other_calls() -> None:
    whole = TensorType((2,), torch.int64)
    dtypes = [result_types(aten.mul.Scalar, (whole, number), {})[0].dtype for number in (1, 1.0, 1)]
    assert dtypes == [torch.int64, torch.float32, torch.int64]


def test_a_kind_of_call_is_inferred_once() -> None:
    calls = []

    def double(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append((args, kwargs))
        return torch.empty(args[0].shape[0] * args[1], device="meta", dtype=kwargs["dtype"])

    def infer(length: int, factor: int, dtype: torch.dtype) -> TensorType:
        return result_types(double, (TensorType((length,), torch.float32), factor), {"dtype": dtype})[0]

    kinds = [(3, 2, torch.float32), (4, 2, torch.float32), (3, 5, torch.float32), (3, 2, torch.int8)]
    for _ in range(2):
        for length, factor, dtype in kinds:
            assert infer(length, factor, dtype) == TensorType((length * factor,), dtype)
    assert len(calls) == len(kinds)
