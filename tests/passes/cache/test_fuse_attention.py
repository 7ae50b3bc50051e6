"""Attention over a cache takes the layout of heads and the rotation along, where nothing else sees them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attending import DIM, HEADS, KV_HEADS, SCALE, VALUE_DIM, Attend, Attending, cached, join, project, qkv, split
from check_pass import check_pass
from torch import Tensor

from llmc.ir.program import Program
from llmc.kernels.ops import attention, cached_attention, fused_attention, rope
from llmc.passes.base import Fuel
from llmc.passes.cache.fuse_attention import FuseAttention
from llmc.passes.queries import is_call, is_op

aten = torch.ops.aten
Around = Callable[[Attending, Tensor, Tensor, Tensor, Tensor], Tensor]


def attend_by(function: Around) -> Attend:
    """A layer whose function of heads and positions is given."""
    return lambda m, place, x, positions: function(m, *qkv(m, place, x), positions)


def fused_calls(program: Program) -> list[dict[str, Any]]:
    return [fused_attention.bind(n.args, dict(n.kwargs)) for n in program.nodes if is_op(n, fused_attention)]


def plain(m: Attending, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    return join(attention(q, k, v, SCALE))


def options(m: Attending, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    return join(attention(q, k, v, SCALE, window=5, softcap=1.5, sinks=m.sinks))


def rotated(interleaved: bool) -> Around:
    def function(m: Attending, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        q, k = (rope(each, positions, m.cos, m.sin, interleaved) for each in (q, k))
        return join(attention(q, k, v, SCALE))

    return function


def permuted(m: Attending, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    out = attention(q.transpose(1, 2).permute(0, 2, 1, 3), k, v, SCALE)
    return out.permute(0, 2, 1, 3).flatten(2)


def joined_to_one_row_a_token(m: Attending, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    rows = attention(q, k, v, SCALE).transpose(1, 2).reshape(-1, HEADS * DIM) * 2
    return rows.view(q.shape[0], q.shape[2], -1)


def joined_by_twos(m: Attending, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    """Rows of two heads each, and then of four."""
    pairs = attention(q, k, v, SCALE).transpose(1, 2).reshape(q.shape[0], -1, 2 * DIM) * 2
    return pairs.reshape(q.shape[0], q.shape[2], HEADS * DIM)


def normed_heads(m: Attending, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    """What is done to each head stays, and is laid out as rows behind it."""
    return join(attention(q / (q.abs().amax(-1, True) + 1), k, v.tanh(), SCALE))


FUSED: dict[str, tuple[Around, int]] = {
    "plain": (plain, 0),
    "window, softcap and sinks": (options, 0),
    "rotated": (rotated(False), 2),
    "neighbours rotated": (rotated(True), 2),
    "permuted": (permuted, 0),
    "joined to one row a token": (joined_to_one_row_a_token, 0),
    "joined by twos": (joined_by_twos, 0),
    "heads changed": (normed_heads, 0),
}


@pytest.mark.parametrize("name", FUSED)
def test_heads_and_rotation_are_the_ops_own(name: str) -> None:
    function, rotations = FUSED[name]
    before = cached(attend_by(function), ring=False)
    assert before.ops()["llmc.rope"] == 2 * rotations
    gone = {"llmc.cached_attention", "llmc.rope"}
    if name != "heads changed":
        gone |= {"aten.transpose", "aten.permute"}
    program = check_pass(FuseAttention(), before, matches=2, gone=gone, there={"llmc.fused_attention"})
    assert program.caches == before.caches
    for call in fused_calls(program):
        assert call["heads"] == HEADS and call["k"] is not None
        assert (call["cos"] is None) == (rotations == 0)


def from_one_product(order: tuple[int, ...] = (0, 1, 2)) -> Attend:
    """Queries, keys and values as parts of one product, in an order of their own."""
    parts = ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, DIM))

    def attend(m: Attending, place: int, x: Tensor, positions: Tensor) -> Tensor:
        rows = project(x, m.layers[place].qkv).split([parts[i][0] * parts[i][1] for i in order], -1)
        q, k, v = (split(rows[order.index(i)], parts[i][0]) for i in range(3))
        q, k = (rope(each, positions, m.cos, m.sin) for each in (q, k))
        return join(attention(q, k, v, SCALE))

    return attend


def test_parts_of_one_product_are_split_by_the_op() -> None:
    program = check_pass(FuseAttention(), cached(from_one_product()), matches=2, gone={"aten.split_with_sizes"})
    assert all(call["k"] is None and call["v"] is None for call in fused_calls(program))


def test_parts_in_another_order_are_split_before() -> None:
    before = cached(from_one_product((0, 2, 1)))
    program = check_pass(FuseAttention(), before, matches=2, there={"aten.split_with_sizes"})
    assert all(call["k"] is not None for call in fused_calls(program))


def test_parts_along_the_sequence_are_no_parts_of_a_row() -> None:
    """Three sequences one behind the other: a split in the right order, of another dim."""

    def attend(m: Attending, place: int, x: Tensor, positions: Tensor) -> Tensor:
        rows = torch.cat(
            [x.repeat(1, 1, HEADS * DIM // x.shape[2] + 1)[..., : HEADS * DIM] * factor for factor in (1, 2, 3)], 1
        )
        length = x.shape[1]
        q, k, v = (split(each, HEADS) for each in rows.split([length, length, length], 1))
        return join(attention(q, k, v, SCALE))

    program = check_pass(FuseAttention(), cached(attend), matches=2, there={"aten.split_with_sizes"})
    assert all(call["k"] is not None for call in fused_calls(program))


@pytest.mark.parametrize("shift", ["positions", "tables", "layout", "size"])
def test_a_rotation_that_is_not_the_same_or_of_an_odd_size_stays_in_front(shift: str) -> None:
    def function(m: Attending, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        cos, sin = (m.cos[:, :7], m.sin[:, :7]) if shift == "size" else (m.cos, m.sin)
        q = rope(q, positions, cos, sin)
        other = positions.clamp(max=3) if shift == "positions" else positions
        k = rope(k, other, sin if shift == "tables" else cos, sin, shift == "layout")
        return join(attention(q, k, v, SCALE))

    program = check_pass(FuseAttention(), cached(attend_by(function)), matches=2, there={"llmc.rope"})
    assert program.ops()["llmc.rope"] == 4
    assert all(call["cos"] is None for call in fused_calls(program))


@pytest.mark.parametrize("both", [False, True])
def test_a_rotation_by_other_positions_stays_in_front(both: bool) -> None:
    """The op counts from `starts`: a rotation that counts otherwise, or one of queries alone, is not its own."""

    def function(m: Attending, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        late = (positions + 1).clamp(max=9)
        q, k = rope(q, late if both else positions, m.cos, m.sin), rope(k, late, m.cos, m.sin) if both else k
        return join(attention(q, k, v, SCALE))

    program = check_pass(FuseAttention(), cached(attend_by(function)), matches=2, there={"llmc.rope"})
    assert all(call["cos"] is None for call in fused_calls(program))


@pytest.mark.parametrize("changed", ["steps", "starts"])
def test_a_count_from_another_place_is_not_from_starts(changed: str) -> None:
    """Only the plain count from `starts` on is the op's own."""
    program = cached(attend_by(rotated(False)))
    (steps,) = [n for n in program.nodes if is_call(n, "arange")]
    (column,) = [n for n in program.nodes if is_call(n, "unsqueeze")]
    with program.graph.inserting_before(steps if changed == "steps" else column):
        if changed == "steps":
            end = program.call(aten.sym_size.int, program.inputs[0], 1, like=steps)
            program.replace(steps, program.call(aten.arange.start, 0, end, dtype=torch.int64, like=steps))
        else:
            capped = program.call(aten.clamp.default, program.inputs[1], 0, 9, like=column)
            column.replace_input_with(program.inputs[1], capped)
    check_pass(FuseAttention(), program, matches=2, there={"llmc.rope"})


def test_layers_that_share_a_cache() -> None:
    def attend(m: Attending, place: int, x: Tensor, positions: Tensor) -> Tensor:
        q, k, v = qkv(m, place, x)
        if place == 0:
            m.held = rope(k, positions, m.cos, m.sin), v
        return join(attention(rope(q, positions, m.cos, m.sin), *m.held, SCALE))  # type: ignore[misc]

    program = check_pass(FuseAttention(), cached(attend), matches=2, gone={"llmc.rope", "llmc.cached_attention"})
    assert len(program.caches) == 1


def test_fuel_is_burnt() -> None:
    program = cached(attend_by(plain))
    assert FuseAttention()(program, Fuel(1)).matches == 1
    assert program.ops()["llmc.fused_attention"] == program.ops()["llmc.cached_attention"] == 1


# Left alone ---------------------------------------------------------------------------------------------------------


def with_(**given: Any) -> Around:
    def function(m: Attending, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        named = {name: getattr(m, value) if isinstance(value, str) else value for name, value in given.items()}
        return join(attention(q, k, v, SCALE, **named))

    return function


def read_by_heads(m: Attending, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    out = attention(q, k, v, SCALE)
    return join(out) + out.amax((1, 2, 3))[:, None, None]


def read_while_turned(m: Attending, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    turned = attention(q, k, v, SCALE).transpose(1, 2)
    return turned.flatten(2) + turned.amax((1, 2, 3))[:, None, None]


def changed_by_heads(m: Attending, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    return join(attention(q, k, v, SCALE) * m.sinks[:, None, None])


def turned_otherwise(m: Attending, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    """[B, H, S, D] -> [B, S, D, H]: rows of another order."""
    return attention(q, k, v, SCALE).permute(0, 2, 3, 1).flatten(2)


def test_values_of_another_size_are_left_alone() -> None:
    given = cached(attend_by(plain), value_dim=VALUE_DIM)
    check_pass(FuseAttention(), given, matches=0, gone={"llmc.fused_attention"}, miss="differ in size")


def test_a_result_that_is_taken_out_twice_is_left_alone() -> None:
    program = cached(attend_by(plain))
    node = next(n for n in program.nodes if is_op(n, cached_attention))
    with program.graph.inserting_after(list(node.users)[-1]):
        again = program.item(node, 0)
    (end,) = program.graph.find_nodes(op="output")
    end.args = ((*end.args[0], again),)
    check_pass(FuseAttention(), program, matches=1, there={"llmc.cached_attention"}, miss="not joined to rows")


def joined_over_sequences(m: Attending, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    """[B, S, H, D] -> [B * S, H, D]: other dims than those of heads."""
    return attention(q, k, v, SCALE).transpose(1, 2).flatten(0, 1).flatten(1).unflatten(0, positions.shape)


LEFT: dict[str, tuple[Around, bool, str]] = {
    "1. a ring": (with_(window=5), True, "its cache is a ring"),
    "2. chunks": (with_(chunk=5), False, "in chunks or by slopes"),
    "2. slopes": (with_(slopes="slopes"), False, "in chunks or by slopes"),
    "4. heads are read": (read_by_heads, True, "not joined to rows"),
    "4. heads are read behind each other": (read_while_turned, True, "not joined to rows"),
    "4. heads are changed": (changed_by_heads, True, "not joined to rows"),
    "4. heads in another order": (turned_otherwise, True, "not joined to rows"),
    "4. sequences are joined": (joined_over_sequences, True, "not joined to rows"),
}


@pytest.mark.parametrize("name", LEFT)
def test_other_attention_is_left_alone(name: str) -> None:
    function, ring, reason = LEFT[name]
    check_pass(
        FuseAttention(), cached(attend_by(function), ring), matches=0, gone={"llmc.fused_attention"}, miss=reason
    )


def test_5_rounded_keys_and_values_are_left_alone() -> None:
    program = cached(attend_by(with_()), False, codes="int8")
    check_pass(
        FuseAttention(), program, matches=0, there={"llmc.quant_cached_attention"}, miss="rounded token by token"
    )
