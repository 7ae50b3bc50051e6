"""FuseAttention fuses cached attention with its head layout and rotation."""

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
    """Return an `attend` that computes `function(model, q, k, v, positions)`."""
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


def joined_to_one_vector_per_token(m: Attending, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    flat = attention(q, k, v, SCALE).transpose(1, 2).reshape(-1, HEADS * DIM) * 2
    return flat.view(q.shape[0], q.shape[2], -1)


def joined_in_pairs(m: Attending, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    """Heads are joined in pairs first, then all four."""
    pairs = attention(q, k, v, SCALE).transpose(1, 2).reshape(q.shape[0], -1, 2 * DIM) * 2
    return pairs.reshape(q.shape[0], q.shape[2], HEADS * DIM)


def scaled_heads(m: Attending, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    """Ops on single heads are not fused; their results become [B, S, H*D] first."""
    return join(attention(q / (q.abs().amax(-1, True) + 1), k, v.tanh(), SCALE))


FUSED: dict[str, tuple[Around, int]] = {
    "plain": (plain, 0),
    "window, softcap and sinks": (options, 0),
    "rotated": (rotated(False), 2),
    "rotated, interleaved": (rotated(True), 2),
    "permuted": (permuted, 0),
    "joined to one vector per token": (joined_to_one_vector_per_token, 0),
    "joined in pairs": (joined_in_pairs, 0),
    "ops on single heads": (scaled_heads, 0),
}


@pytest.mark.parametrize("name", FUSED)
def test_layout_and_rotation_are_fused(name: str) -> None:
    function, rotations = FUSED[name]
    before = cached(attend_by(function), ring=False)
    assert before.ops()["llmc.rope"] == 2 * rotations
    gone = {"llmc.cached_attention", "llmc.rope"}
    if name != "ops on single heads":
        gone |= {"aten.transpose", "aten.permute"}
    program = check_pass(FuseAttention(8), before, matches=2, gone=gone, there={"llmc.fused_attention"})
    assert program.caches == before.caches
    for call in fused_calls(program):
        assert call["heads"] == HEADS and call["k"] is not None
        assert (call["cos"] is None) == (rotations == 0)


def test_constant_scales_are_fused_and_those_of_tokens_are_not() -> None:
    before = cached(attend_by(rotated(False)), ring=False, codes="int8", by_channel=True)
    program = check_pass(FuseAttention(8), before, matches=2, gone={"llmc.cached_attention", "llmc.rope"})
    for i, call in enumerate(fused_calls(program)):
        assert (str(call["k_scales"].target), str(call["v_scales"].target)) == (
            f"keys_{i}.scales",
            f"values_{i}.scales",
        )
    by_token = cached(attend_by(rotated(False)), ring=False, codes="int8")
    check_pass(FuseAttention(8), by_token, matches=0, there={"llmc.quant_cached_attention"})


def test_heads_that_are_too_large_for_the_kernel_stay() -> None:
    before = cached(attend_by(rotated(False)), ring=False)
    check_pass(FuseAttention(8, largest_head=DIM), before, matches=2, there={"llmc.fused_attention"})
    wrong = f"the size of its heads is over {DIM - 8}"
    check_pass(FuseAttention(8, largest_head=DIM - 8), before, matches=0, miss=wrong)


def from_one_linear(order: tuple[int, ...] = (0, 1, 2)) -> Attend:
    """Split q, k and v from the output of one linear, in the order of these indices."""
    sizes = ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, DIM))

    def attend(m: Attending, place: int, x: Tensor, positions: Tensor) -> Tensor:
        parts_of_qkv = project(x, m.layers[place].qkv).split([sizes[i][0] * sizes[i][1] for i in order], -1)
        q, k, v = (split(parts_of_qkv[order.index(i)], sizes[i][0]) for i in range(3))
        q, k = (rope(each, positions, m.cos, m.sin) for each in (q, k))
        return join(attention(q, k, v, SCALE))

    return attend


def test_a_split_of_q_k_v_is_fused() -> None:
    program = check_pass(FuseAttention(8), cached(from_one_linear()), matches=2, gone={"aten.split_with_sizes"})
    assert all(call["k"] is None and call["v"] is None for call in fused_calls(program))


def test_a_split_in_another_order_stays() -> None:
    before = cached(from_one_linear((0, 2, 1)))
    program = check_pass(FuseAttention(8), before, matches=2, there={"aten.split_with_sizes"})
    assert all(call["k"] is not None for call in fused_calls(program))


def test_a_split_along_the_sequence_stays() -> None:
    """The split has the right order, but another dim: three sequences in a line."""

    def attend(m: Attending, place: int, x: Tensor, positions: Tensor) -> Tensor:
        triple = torch.cat(
            [x.repeat(1, 1, HEADS * DIM // x.shape[2] + 1)[..., : HEADS * DIM] * factor for factor in (1, 2, 3)], 1
        )
        length = x.shape[1]
        q, k, v = (split(each, HEADS) for each in triple.split([length, length, length], 1))
        return join(attention(q, k, v, SCALE))

    program = check_pass(FuseAttention(8), cached(attend), matches=2, there={"aten.split_with_sizes"})
    assert all(call["k"] is not None for call in fused_calls(program))


@pytest.mark.parametrize("difference", ["positions", "tables", "layout", "size"])
def test_a_rotation_that_differs_or_has_another_size_stays(difference: str) -> None:
    def function(m: Attending, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        cos, sin = (m.cos[:, :7], m.sin[:, :7]) if difference == "size" else (m.cos, m.sin)
        q = rope(q, positions, cos, sin)
        other = positions.clamp(max=3) if difference == "positions" else positions
        k = rope(k, other, sin if difference == "tables" else cos, sin, difference == "layout")
        return join(attention(q, k, v, SCALE))

    program = check_pass(FuseAttention(8), cached(attend_by(function)), matches=2, there={"llmc.rope"})
    assert program.ops()["llmc.rope"] == 4
    assert all(call["cos"] is None for call in fused_calls(program))


@pytest.mark.parametrize("both", [False, True])
def test_a_rotation_at_other_positions_stays(both: bool) -> None:
    """The fused op counts positions from `starts` and rotates both q and k, or none."""

    def function(m: Attending, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        late = (positions + 1).clamp(max=9)
        q, k = rope(q, late if both else positions, m.cos, m.sin), rope(k, late, m.cos, m.sin) if both else k
        return join(attention(q, k, v, SCALE))

    program = check_pass(FuseAttention(8), cached(attend_by(function)), matches=2, there={"llmc.rope"})
    assert all(call["cos"] is None for call in fused_calls(program))


@pytest.mark.parametrize("changed", ["steps", "starts"])
def test_a_rotation_at_computed_positions_stays(changed: str) -> None:
    """Positions must be exactly starts[:, None] + arange(S)."""
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
    check_pass(FuseAttention(8), program, matches=2, there={"llmc.rope"})


def test_layers_that_share_a_cache() -> None:
    def attend(m: Attending, place: int, x: Tensor, positions: Tensor) -> Tensor:
        q, k, v = qkv(m, place, x)
        if place == 0:
            m.held = rope(k, positions, m.cos, m.sin), v
        return join(attention(rope(q, positions, m.cos, m.sin), *m.held, SCALE))  # type: ignore[misc]

    program = check_pass(FuseAttention(8), cached(attend), matches=2, gone={"llmc.rope", "llmc.cached_attention"})
    assert len(program.caches) == 1


def test_fuel_is_burnt() -> None:
    program = cached(attend_by(plain))
    assert FuseAttention(8)(program, Fuel(1)).matches == 1
    assert program.ops()["llmc.fused_attention"] == program.ops()["llmc.cached_attention"] == 1


# Left alone ---------------------------------------------------------------------------------------------------------


def with_options(**options: Any) -> Around:
    def function(m: Attending, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        named = {name: getattr(m, value) if isinstance(value, str) else value for name, value in options.items()}
        return join(attention(q, k, v, SCALE, **named))

    return function


def heads_used_elsewhere(m: Attending, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    out = attention(q, k, v, SCALE)
    return join(out) + out.amax((1, 2, 3))[:, None, None]


def transpose_used_elsewhere(m: Attending, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    transposed = attention(q, k, v, SCALE).transpose(1, 2)
    return transposed.flatten(2) + transposed.amax((1, 2, 3))[:, None, None]


def scaled_after_attention(m: Attending, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    return join(attention(q, k, v, SCALE) * m.sinks[:, None, None])


def transposed_differently(m: Attending, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    """[B, H, S, D] -> [B, S, D, H]: channels in another order."""
    return attention(q, k, v, SCALE).permute(0, 2, 3, 1).flatten(2)


def test_3_values_of_another_size_are_left_alone() -> None:
    program = cached(attend_by(plain), value_dim=VALUE_DIM)
    check_pass(FuseAttention(8), program, matches=0, gone={"llmc.fused_attention"}, miss="head sizes")


def test_4_an_output_of_the_program_is_left_alone() -> None:
    program = cached(attend_by(plain))
    node = next(n for n in program.nodes if is_op(n, cached_attention))
    with program.graph.inserting_after(list(node.users)[-1]):
        again = program.item(node, 0)
    (end,) = program.graph.find_nodes(op="output")
    end.args = ((*end.args[0], again),)
    check_pass(FuseAttention(8), program, matches=1, there={"llmc.cached_attention"}, miss="not joined to [B, S, H*D]")


def joined_over_sequences(m: Attending, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    """[B, S, H, D] -> [B * S, H, D]: other dims are joined."""
    return attention(q, k, v, SCALE).transpose(1, 2).flatten(0, 1).flatten(1).unflatten(0, positions.shape)


LEFT: dict[str, tuple[Around, bool, str]] = {
    "1. a ring": (with_options(window=5), True, "its cache is a ring cache"),
    "2. chunks": (with_options(chunk=5), False, "uses chunks or alibi slopes"),
    "2. slopes": (with_options(slopes="slopes"), False, "uses chunks or alibi slopes"),
    "4. heads are used elsewhere": (heads_used_elsewhere, True, "not joined to [B, S, H*D]"),
    "4. their transpose is used elsewhere": (transpose_used_elsewhere, True, "not joined to [B, S, H*D]"),
    "4. heads are changed": (scaled_after_attention, True, "not joined to [B, S, H*D]"),
    "4. heads in another order": (transposed_differently, True, "not joined to [B, S, H*D]"),
    "4. sequences are joined": (joined_over_sequences, True, "not joined to [B, S, H*D]"),
}


@pytest.mark.parametrize("name", LEFT)
def test_other_attention_is_left_alone(name: str) -> None:
    function, ring, reason = LEFT[name]
    check_pass(
        FuseAttention(8), cached(attend_by(function), ring), matches=0, gone={"llmc.fused_attention"}, miss=reason
    )


def test_5_quantized_keys_and_values_are_left_alone() -> None:
    program = cached(attend_by(with_options()), False, codes="int8")
    check_pass(FuseAttention(8), program, matches=0, there={"llmc.quant_cached_attention"}, miss="a scale per token")
