"""HoistLogitSelection selects tokens after the last attention."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attending import SCALE, Attending, Layer, cached, join, project, qkv
from check_pass import check_pass, samples
from torch import Tensor, fx

from llmc.ir.program import Program
from llmc.kernels.ops import add_rms_norm, attention, linear, rms_norm, take_rows
from llmc.passes.base import Fuel, PassResult
from llmc.passes.cache.hoist_logit_selection import HoistLogitSelection
from llmc.passes.cache.select_logits import SelectLogits
from llmc.passes.optimize.fuse_residual_norm import FuseResidualNorm
from llmc.passes.queries import is_op


def attend(m: Attending, place: int, x: Tensor, positions: Tensor) -> Tensor:
    return join(attention(*qkv(m, place, x), SCALE))


def program(forward: Callable[[Layer, Attending, int, Tensor, Tensor], Tensor] | None = None) -> Program:
    """Two layers that compute `forward`; tokens are selected in front of the LM head."""
    with pytest.MonkeyPatch.context() as patch:
        if forward is not None:
            patch.setattr(Layer, "forward", forward)
        result = cached(attend)
    FuseResidualNorm()(result)
    assert SelectLogits()(result).matches == 1
    return result


def selected_values(result: Program) -> list[fx.Node]:
    return [node.args[0] for node in result.nodes if is_op(node, take_rows)]  # type: ignore[misc]


def ops_after_attention(layer: Layer, m: Attending, place: int, x: Tensor, positions: Tensor) -> Tensor:
    """A residual add, a norm with two results, a gate and an activation."""
    x = project(attend(m, place, x, positions), layer.o) + x
    normed = rms_norm(x, layer.o.bias, 0.02)
    return x + torch.sigmoid(normed * 0.5) * normed


@pytest.mark.parametrize("forward", [None, ops_after_attention])
def test_the_last_layer_is_computed_for_selected_tokens(
    forward: Callable[[Layer, Attending, int, Tensor, Tensor], Tensor] | None,
) -> None:
    result = check_pass(HoistLogitSelection(), program(forward), matches=1)
    joined, residual = selected_values(result)
    assert "reshape" in str(joined.target) or "view" in str(joined.target)
    assert residual.meta["val"].shape[2] == 12
    count = result.inputs[2].meta["val"].shape[0]
    late = [node for node in result.nodes if is_op(node, linear)][-2:]  # o of the last layer, and the LM head
    assert [str(node.meta["val"].shape[1]) for node in late] == [str(count)] * 2


def test_logits_equal_those_of_all_tokens() -> None:
    result = program(ops_after_attention)
    all_logits, *caches = result.run(*with_wanted(result, range(5)))
    HoistLogitSelection()(result)
    for wanted in ([-1], [4, 0, 0], range(5)):
        logits, *new_caches = result.run(*with_wanted(result, wanted))
        torch.testing.assert_close(logits, all_logits[:, list(wanted)])
        assert all(map(torch.equal, new_caches, caches))


def with_wanted(result: Program, wanted: object) -> list[Tensor]:
    tokens, starts, _, *caches = samples(result, 2, 5)
    return [tokens, starts, torch.tensor(list(wanted)), *caches]  # type: ignore[call-overload]


def test_nothing_is_done_without_fuel_or_a_selection() -> None:
    result = program()
    (before,) = selected_values(result)
    assert HoistLogitSelection()(result, Fuel(0)) == PassResult(0)
    assert selected_values(result) == [before]
    check_pass(HoistLogitSelection(), cached(attend), matches=0, gone={"llmc.take_rows"})


def with_second_output(result: Program) -> Program:
    """1. The last layer's sum is an output of the program too."""
    (end,) = result.graph.find_nodes(op="output")
    (selection,) = (node for node in result.nodes if is_op(node, take_rows))
    end.args = ((*end.args[0], selection.args[0]),)
    return result


def transposed(layer: Layer, m: Attending, place: int, x: Tensor, positions: Tensor) -> Tensor:
    """2. The values on the way have the sequence in another dim."""
    y = x + project(attend(m, place, x, positions), layer.o)
    return (y.transpose(1, 2) * 2.0).transpose(1, 2)


@pytest.mark.parametrize("make", [lambda: with_second_output(program()), lambda: program(transposed)], ids=["1", "2"])
def test_values_with_other_users_or_shapes_are_left_alone(make: Callable[[], Program]) -> None:
    result = make()
    before = selected_values(result)
    check_pass(HoistLogitSelection(), result, matches=0)
    assert selected_values(result) == before


def test_an_op_with_two_results_is_moved_whole_or_not_at_all() -> None:
    """One result of the norm is an output of the program, so the norm is not moved."""
    result = program(lambda *a: rms_norm(a[3] + project(attend(*a[1:]), a[0].o), a[0].o.bias, 0.02))
    norm = [node for node in result.nodes if is_op(node, add_rms_norm)][-1]
    with result.graph.inserting_after(norm):
        other = result.item(norm, 1)
    (end,) = result.graph.find_nodes(op="output")
    end.args = ((*end.args[0], other),)
    check_pass(HoistLogitSelection(), result, matches=0)
