"""What every op of the dialect is held to: its exact values, its schema, and tracing without a guard."""

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
        within = TOL.get(got.dtype, {"rtol": 0.0, "atol": 0.0})  # codes and indices are right or wrong
        torch.testing.assert_close(got.double(), exact, **within)


@pytest.fixture
def check() -> Callable[..., None]:
    """check(op, args, kwargs, expected): the values, against float64, and what tracing says of them."""

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
    """contract(op, args, kwargs): torch's own check of schema, aliasing and compilation; about a second."""

    def run(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
        if any(isinstance(each, torch.Tensor) and each.dtype in FLOAT8.values() for each in args):
            tests.remove("test_schema")  # it compares arguments by allclose, which has no float8
        torch.library.opcheck(op.overload, args, kwargs, test_utils=tests)

    return run


@pytest.fixture
def traces() -> Callable[..., None]:
    """traces(fn, args, others, dims): export with the named dims free, then run at the other shapes too.

    `dims` names an argument's axes by one letter each, "B" and "S" free and the rest fixed: "BhSd".
    A guard on a free dim, even one that holds for both shapes, fails the export.
    """

    def run(fn: Callable[..., Any], args: tuple[Any, ...], others: tuple[Any, ...], dims: tuple[str, ...]) -> None:
        class Module(torch.nn.Module):
            def forward(self, *tensors: torch.Tensor) -> Any:
                return fn(*tensors)

        free = tuple({axis: DYNAMIC[name] for axis, name in enumerate(names) if name in DYNAMIC} for names in dims)
        exported = torch.export.export(Module(), args, dynamic_shapes=(free,), strict=False).module()
        for tensors in (args, others):
            torch.testing.assert_close(exported(*tensors), fn(*tensors))

    return run
