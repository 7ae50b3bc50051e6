"""Checks for every op: exact values, schema, and export with dynamic shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerances import TOL
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from llmc.kernels.ops.quantized import FLOAT8

DYNAMIC = {"B": torch.export.Dim("B", min=1, max=512), "S": torch.export.Dim("S", min=1, max=4096)}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def _close(actual: Any, expected: Any) -> None:
    for got, exact in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        exact = torch.as_tensor(exact, dtype=torch.float64)
        tolerance = TOL.get(got.dtype, {"rtol": 0.0, "atol": 0.0})  # codes and indices must be equal
        torch.testing.assert_close(got.double(), exact, **tolerance)


@pytest.fixture
def check() -> Callable[..., None]:
    """check(op, args, kwargs, expected): compare the op with exact values.

    Also compares shapes, dtypes and strides with those of the fake implementation.
    """

    def run(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], expected: Any) -> None:
        actual = op(*args, **kwargs)
        _close(actual, expected)
        with FakeTensorMode() as mode:
            fake = op(
                *tree_map_only(torch.Tensor, mode.from_tensor, args),
                **tree_map_only(torch.Tensor, mode.from_tensor, kwargs),
            )
        for got, traced in zip(tree_leaves(actual), tree_leaves(fake), strict=True):
            assert (got.shape, got.dtype, got.stride()) == (traced.shape, traced.dtype, traced.stride())

    return run


@pytest.fixture
def contract() -> Callable[..., None]:
    """contract(op, args, kwargs): run torch's check of schemas and compilation.

    Takes about a second.
    """

    def run(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
        if any(isinstance(each, torch.Tensor) and each.dtype in FLOAT8.values() for each in args):
            tests.remove("test_schema")  # it calls allclose on the arguments, which does not support float8
        torch.library.opcheck(op.overload, args, kwargs, test_utils=tests)

    return run


@pytest.fixture
def traces() -> Callable[..., None]:
    """traces(fn, args, others, dims): export with dynamic dimensions and run.

    The exported program runs with `args` and with `others`. `dims` has a string per argument with one letter per axis.
    "B" and "S" are dynamic, all others static: "BhSd". A guard on a dynamic dimension fails the export, even if it
    holds for both sets of arguments.
    """

    def run(fn: Callable[..., Any], args: tuple[Any, ...], others: tuple[Any, ...], dims: tuple[str, ...]) -> None:
        class Module(torch.nn.Module):
            def forward(self, *tensors: torch.Tensor) -> Any:
                return fn(*tensors)

        dynamic = tuple({axis: DYNAMIC[name] for axis, name in enumerate(names) if name in DYNAMIC} for names in dims)
        exported = torch.export.export(Module(), args, dynamic_shapes=(dynamic,), strict=False).module()
        for tensors in (args, others):
            torch.testing.assert_close(exported(*tensors), fn(*tensors))

    return run
