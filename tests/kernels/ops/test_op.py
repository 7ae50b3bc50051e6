from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmc.kernels import ops
from llmc.kernels.ops import op as framework


@pytest.fixture
def twice(monkeypatch: pytest.MonkeyPatch):
    """Define an op in a registry that exists for one test."""
    monkeypatch.setattr(framework, "OPS", {})
    monkeypatch.setattr(framework, "LIBRARY", torch.library.Library(framework.NAMESPACE, "FRAGMENT"))

    @framework.op
    def twice_for_test(x: Tensor, factor: float = 2.0) -> Tensor:
        return x * factor

    yield twice_for_test
    framework.LIBRARY._destroy()


X = torch.ones(3)


def test_without_a_provider_the_meaning_runs(twice):
    assert twice.serves(X) == "meaning"
    assert torch.equal(twice(X), 2 * X)
    torch.library.opcheck(twice.overload, (X,), {"factor": 3.0})


def test_the_first_provider_that_supports_the_arguments_runs(twice):
    factors = []

    def when(x, factor):
        factors.append(factor)
        return factor == 5.0

    @twice.provider("broken", available=lambda: False)
    def _(x, factor=2.0):
        raise AssertionError("an unavailable provider was called")

    @twice.provider("five", when=when)
    def _(x, factor=2.0):
        return x + 5

    @twice.provider("rest")
    def _(x, factor=2.0):
        return x + 1

    assert torch.equal(twice(X, 5.0), X + 5)
    assert torch.equal(twice(X), X + 1)
    assert factors == [5.0, 2.0]  # the predicate receives the default too
    assert (twice.serves(X, factor=5.0), twice.serves(X)) == ("five", "rest")


def test_providers_are_tried_in_the_order_of_priority(twice):
    twice.provider("one")(lambda x, factor=2.0: x + 1)
    twice.provider("two")(lambda x, factor=2.0: x + 2)
    twice.priority[:] = ["two", "one"]
    assert torch.equal(twice(X), X + 2)
    twice.priority.clear()
    assert torch.equal(twice(X), 2 * X)


def test_a_provider_with_other_parameters_is_refused(twice):
    with pytest.raises(TypeError, match="other"):
        twice.provider("other")(lambda x, scale=2.0: x)
    with pytest.raises(TypeError, match="default"):
        twice.provider("default")(lambda x, factor=3.0: x)
    assert not twice.providers and not twice.priority


def test_a_second_provider_of_the_same_name_is_refused(twice):
    twice.provider("one")(lambda x, factor=2.0: x)
    with pytest.raises(ValueError, match="already"):
        twice.provider("one")(lambda x, factor=2.0: x)


def test_a_fake_infers_shapes_instead_of_the_meaning(twice):
    called = []

    @framework.op(fake=lambda x: called.append("fake") or x.new_empty(x.shape))
    def once_for_test(x: Tensor) -> Tensor:
        called.append("meaning")
        return x.clone()

    assert once_for_test(X.to("meta")).shape == X.shape
    assert called == ["fake"]
    assert torch.equal(once_for_test(X), X)
    assert called == ["fake", "meaning"]


def test_opcheck_compares_a_fake_with_the_meaning(twice):
    @framework.op(fake=lambda x: x.new_empty(x.shape))
    def wide_for_test(x: Tensor) -> Tensor:
        return x.double()

    with pytest.raises(torch.testing._internal.optests.generate_tests.OpCheckError, match="Dtypes"):
        torch.library.opcheck(wide_for_test.overload, (X,), test_utils="test_faketensor")


def test_an_op_defined_twice_is_refused(twice):
    def twice_for_test(x: Tensor, factor: float = 2.0) -> Tensor:
        return x

    with pytest.raises(ValueError, match="defined twice"):
        framework.op(twice_for_test)


def test_op_of(twice):
    assert ops.op_of(twice.overload) is twice
    assert ops.op_of(torch.ops.aten.mul.Tensor) is None
    assert ops.op_of(torch.mul) is None
    assert ops.op_of("x") is None


def test_bind_names_arguments_and_fills_defaults(twice):
    assert twice.bind((X,), {}) == {"x": X, "factor": 2.0}
    node = torch.fx.Graph().placeholder("x")
    assert twice.bind((), {"factor": 4.0, "x": node}) == {"x": node, "factor": 4.0}


def test_an_op_is_traced_as_one_node_with_dynamic_shapes(twice, traces):
    twice.provider("never traced")(lambda x, factor=2.0: x * factor)
    traces(lambda x: twice(x, 3.0), (torch.ones(2, 5),), (torch.ones(1, 1),), ("BS",))
    graph = torch.export.export(_Caller(twice), (X,)).graph
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [twice.overload]


class _Caller(torch.nn.Module):
    def __init__(self, op):
        super().__init__()
        self.op = op

    def forward(self, x):
        return self.op(x)


def test_all_ops_are_exported():
    assert {name: getattr(ops, name) for name in ops.all_ops()} == ops.all_ops()
    assert set(ops.__all__) == {*ops.all_ops(), "all_ops", "op_of"}
    assert len(ops.all_ops()) == 16
