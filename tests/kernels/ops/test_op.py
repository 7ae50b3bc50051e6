from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmc.kernels import ops
from llmc.kernels.ops import op as framework


@pytest.fixture
def twice(monkeypatch: pytest.MonkeyPatch):
    """An op of its own, in a registry that is gone after the test."""
    monkeypatch.setattr(framework, "_OPS", {})
    monkeypatch.setattr(framework, "_LIBRARY", torch.library.Library(framework.NAMESPACE, "FRAGMENT"))

    @framework.op
    def twice_for_test(x: Tensor, factor: float = 2.0) -> Tensor:
        return x * factor

    yield twice_for_test
    framework._LIBRARY._destroy()


X = torch.ones(3)


def test_without_a_provider_the_meaning_serves(twice):
    assert twice.serves(X) == "meaning"
    assert torch.equal(twice(X), 2 * X)
    torch.library.opcheck(twice.overload, (X,), {"factor": 3.0})


def test_the_first_provider_that_takes_the_arguments_serves(twice):
    asked = []

    def when(x, factor):
        asked.append(factor)
        return factor == 5.0

    @twice.provider("broken", available=lambda: False)
    def _(x, factor=2.0):
        raise AssertionError("is not available")

    @twice.provider("five", when=when)
    def _(x, factor=2.0):
        return x + 5

    @twice.provider("rest")
    def _(x, factor=2.0):
        return x + 1

    assert torch.equal(twice(X, 5.0), X + 5)
    assert torch.equal(twice(X), X + 1)
    assert asked == [5.0, 2.0]  # the default reaches the predicate too
    assert (twice.serves(X, factor=5.0), twice.serves(X)) == ("five", "rest")


def test_priority_is_the_order(twice):
    twice.provider("one")(lambda x, factor=2.0: x + 1)
    twice.provider("two")(lambda x, factor=2.0: x + 2)
    twice.priority[:] = ["two", "one"]
    assert torch.equal(twice(X), X + 2)
    twice.priority.clear()
    assert torch.equal(twice(X), 2 * X)


def test_a_provider_that_drifts_is_refused(twice):
    with pytest.raises(TypeError, match="other"):
        twice.provider("other")(lambda x, scale=2.0: x)
    with pytest.raises(TypeError, match="default"):
        twice.provider("default")(lambda x, factor=3.0: x)
    assert not twice.providers and not twice.priority


def test_a_provider_name_is_taken_once(twice):
    twice.provider("one")(lambda x, factor=2.0: x)
    with pytest.raises(ValueError, match="already"):
        twice.provider("one")(lambda x, factor=2.0: x)


def test_a_fake_says_the_shapes_in_the_place_of_the_meaning(twice):
    called = []

    @framework.op(fake=lambda x: called.append("fake") or x.new_empty(x.shape))
    def once_for_test(x: Tensor) -> Tensor:
        called.append("meaning")
        return x.clone()

    assert once_for_test(X.to("meta")).shape == X.shape
    assert called == ["fake"]
    assert torch.equal(once_for_test(X), X)
    assert called == ["fake", "meaning"]


def test_opcheck_holds_a_fake_to_the_meaning(twice):
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


def test_traced_as_one_node_with_free_shapes(twice, traces):
    twice.provider("never traced")(lambda x, factor=2.0: x * factor)
    traces(lambda x: twice(x, 3.0), (torch.ones(2, 5),), (torch.ones(1, 1),), ("BS",))
    graph = torch.export.export(_Calls(twice), (X,)).graph
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [twice.overload]


class _Calls(torch.nn.Module):
    def __init__(self, op):
        super().__init__()
        self.op = op

    def forward(self, x):
        return self.op(x)


def test_the_dialect_is_all_exported():
    assert {name: getattr(ops, name) for name in ops.all_ops()} == ops.all_ops()
    assert set(ops.__all__) == {*ops.all_ops(), "all_ops", "op_of"}
    assert len(ops.all_ops()) == 16
