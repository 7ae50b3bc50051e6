"""The choice of rows stands behind the last attention, and what comes behind it is computed for them alone."""

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
    """Two layers that end as `forward` says, and the choice of rows in front of the head."""
    with pytest.MonkeyPatch.context() as patch:
        if forward is not None:
            patch.setattr(Layer, "forward", forward)
        made = cached(attend)
    FuseResidualNorm()(made)
    assert SelectLogits()(made).matches == 1
    return made


def taken(made: Program) -> list[fx.Node]:
    return [node.args[0] for node in made.nodes if is_op(node, take_rows)]  # type: ignore[misc]


def behind_attention(layer: Layer, m: Attending, place: int, x: Tensor, positions: Tensor) -> Tensor:
    """A residual, a norm that gives two values, a gate, an activation."""
    x = project(attend(m, place, x, positions), layer.o) + x
    normed = rms_norm(x, layer.o.bias, 0.02)
    return x + torch.sigmoid(normed * 0.5) * normed


@pytest.mark.parametrize("forward", [None, behind_attention])
def test_the_last_layer_is_computed_for_the_chosen_rows(
    forward: Callable[[Layer, Attending, int, Tensor, Tensor], Tensor] | None,
) -> None:
    made = check_pass(HoistLogitSelection(), program(forward), matches=1)
    joined, residual = taken(made)
    assert "reshape" in str(joined.target) or "view" in str(joined.target)
    assert residual.meta["val"].shape[2] == 12
    count = made.inputs[2].meta["val"].shape[0]
    late = [node for node in made.nodes if is_op(node, linear)][-2:]  # o of the last layer and the head
    assert [str(node.meta["val"].shape[1]) for node in late] == [str(count)] * 2


def test_any_rows_are_those_of_the_whole() -> None:
    made = program(behind_attention)
    whole, *caches = made.run(*with_rows(made, range(5)))
    HoistLogitSelection()(made)
    for rows in ([-1], [4, 0, 0], range(5)):
        logits, *same = made.run(*with_rows(made, rows))
        torch.testing.assert_close(logits, whole[:, list(rows)])
        assert all(map(torch.equal, same, caches))


def with_rows(made: Program, rows: object) -> list[Tensor]:
    tokens, starts, _, *caches = samples(made, 2, 5)
    return [tokens, starts, torch.tensor(list(rows)), *caches]  # type: ignore[call-overload]


def test_without_fuel_or_a_choice_nothing_is_done() -> None:
    made = program()
    (before,) = taken(made)
    assert HoistLogitSelection()(made, Fuel(0)) == PassResult(0)
    assert taken(made) == [before]
    check_pass(HoistLogitSelection(), cached(attend), matches=0, gone={"llmc.take_rows"})


def goes_out(made: Program) -> Program:
    """1. The last layer's sum is an output as well."""
    (end,) = made.graph.find_nodes(op="output")
    (chosen,) = (node for node in made.nodes if is_op(node, take_rows))
    end.args = ((*end.args[0], chosen.args[0]),)
    return made


def summed(layer: Layer, m: Attending, place: int, x: Tensor, positions: Tensor) -> Tensor:
    """2. What is read has the sequence in another place."""
    y = x + project(attend(m, place, x, positions), layer.o)
    return (y.transpose(1, 2) * 2.0).transpose(1, 2)


@pytest.mark.parametrize("make", [lambda: goes_out(program()), lambda: program(summed)], ids=["1", "2"])
def test_what_others_read_or_has_another_shape_is_left_alone(make: Callable[[], Program]) -> None:
    made = make()
    before = taken(made)
    check_pass(HoistLogitSelection(), made, matches=0)
    assert taken(made) == before


def test_a_call_is_not_parted_from_its_values() -> None:
    """One value of the norm goes out; the other is chosen from, and the norm stays whole."""
    made = program(lambda *a: rms_norm(a[3] + project(attend(*a[1:]), a[0].o), a[0].o.bias, 0.02))
    norm = [node for node in made.nodes if is_op(node, add_rms_norm)][-1]
    with made.graph.inserting_after(norm):
        other = made.item(norm, 1)
    (end,) = made.graph.find_nodes(op="output")
    end.args = ((*end.args[0], other),)
    check_pass(HoistLogitSelection(), made, matches=0)
