"""Attention together with the layout of heads and the rotation, as fused kernels take it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...ir.program import Miss, Program
from ...ir.stages import Stage
from ...kernels.ops import cached_attention, fused_attention, quant_cached_attention, rope
from ..base import Rewrite, miss
from ..queries import arguments, is_call, is_op, same_shape, shape
from .insert_kv_cache import InsertKvCache

_ATEN = torch.ops.aten

# Fused kernels rotate so many pairs at once, and take heads that so many numbers fill.
_ANGLES = 8


class FuseAttention(Rewrite):
    """Let one op split heads, rotate, attend over the cache and join heads.

    Example:  q, k, v = split(qkv);  each = transpose(reshape(each, [B, S, -1, D]), 1, 2)
              q, k = rope(q, positions, cos, sin), rope(k, positions, cos, sin)
              out, keys, values = cached_attention(q, k, v, keys, values, starts, scale)
              y = reshape(transpose(out, 1, 2), [B, S, -1])
    Becomes:  y, keys, values = fused_attention(qkv, None, None, keys, values, starts, heads, scale, cos, sin, ...)

    Queries, keys or values that don't come from rows are laid out as rows first. A rotation that is not the same for
    queries and keys, or is of an odd size, stays in front, and so do q, k and v that are not the parts of one split in
    this order.

    Left alone: 1. a ring, whose slots are not positions; 2. chunks and slopes, which the fused op does not know;
    3. keys and values of different or odd sizes, which fused kernels don't take; 4. heads that are not joined to rows;
    5. rounded keys and values: fused kernels know scales that don't change from token to token only.
    """

    needs = Stage.CACHED
    after = (InsertKvCache,)

    def rewrite(self, program: Program, node: fx.Node) -> bool | Miss | None:
        if is_op(node, quant_cached_attention):
            return miss("its keys and values are rounded token by token", node)
        if not is_op(node, cached_attention):
            return None
        call = cached_attention.bind(node.args, dict(node.kwargs))
        if call["ring"]:
            return miss("its cache is a ring", node)
        if call["chunk"] is not None or call["slopes"] is not None:
            return miss("it attends in chunks or by slopes", node)
        if str(shape(call["k"])[3]) != str(shape(call["v"])[3]):
            return miss("its keys and values differ in size", node)
        if shape(call["k"])[3] % _ANGLES:
            return miss("the size of its heads is no multiple of 8", node)
        joined = _joined_heads(node)
        if joined is None:
            return miss("its heads are not joined to rows", node)
        q, k, v = call["q"], call["k"], call["v"]
        heads = int(shape(q)[1])
        tables: tuple[Any, Any, bool] = (None, None, False)
        rotation = _same_rotation(q, k, call["starts"])
        if rotation and shape(rotation[0])[1] % _ANGLES == 0 and shape(q)[3] % (2 * _ANGLES) == 0:
            q, k, tables = q.args[0], k.args[0], rotation
        with program.graph.inserting_before(node):
            rows = [_as_rows(program, x) for x in (q, k, v)]
            packed = _packed(rows)
            fused = program.call(
                fused_attention, *(packed or rows), call["k_cache"], call["v_cache"], call["starts"], heads,
                call["scale"], *tables, call["window"], call["softcap"], call["sinks"], like=node,
            )  # fmt: skip
            out, keys, values = (program.item(fused, i) for i in range(3))
        for user in list(node.users):
            if user.args[1] != 0:
                program.replace(user, keys if user.args[1] == 1 else values)
        if is_call(joined, "flatten") or same_shape(joined, out):
            program.replace(joined, out)
        else:
            program.replace_with(joined, _ATEN.reshape.default, out, joined.args[1])
        return True


def _joined_heads(node: fx.Node) -> fx.Node | None:
    """The reshape of [B, S, H, D] that the first result of an attention becomes, if nothing else reads it."""
    outs = [user for user in node.users if user.args[1] == 0]
    if len(outs) != 1 or len(outs[0].users) != 1:
        return None
    (turned,) = outs[0].users
    if not _swaps_heads(turned) or len(turned.users) != 1:
        return None
    (joined,) = turned.users
    if is_call(joined, "flatten"):
        return joined if len(shape(joined)) == 3 and _same_front(joined, turned) else None
    return joined if is_call(joined, "reshape", "view") else None


def _swaps_heads(node: object) -> bool:
    """Whether a call swaps the dims 1 and 2 of four."""
    if is_call(node, "transpose"):
        return {int(dim) % 4 for dim in node.args[1:3]} == {1, 2}  # type: ignore[arg-type]
    return is_call(node, "permute") and [int(dim) % 4 for dim in node.args[1]] == [0, 2, 1, 3]  # type: ignore[union-attr,arg-type]


def _same_front(one: fx.Node, other: fx.Node) -> bool:
    return [str(size) for size in shape(one)[:2]] == [str(size) for size in shape(other)[:2]]


def _same_rotation(q: Any, k: Any, starts: fx.Node) -> tuple[fx.Node, fx.Node, bool] | None:
    """Tables and layout of the rope that both queries and keys go through at the positions behind `starts`."""
    if not (is_op(q, rope) and is_op(k, rope)):
        return None
    one, other = (rope.bind(x.args, dict(x.kwargs)) for x in (q, k))
    if any(one[name] is not other[name] for name in ("positions", "cos", "sin", "interleaved")):
        return None
    positions = one["positions"]
    if not is_call(positions, "add") or not is_call(column := positions.args[0], "unsqueeze"):
        return None
    if column.args[0] is not starts or getattr(positions.args[1], "target", None) is not _ATEN.arange.default:
        return None
    return one["cos"], one["sin"], one["interleaved"]


def _as_rows(program: Program, node: fx.Node) -> fx.Node:
    """[B, H, S, D] as [B, S, H*D]: what it was made of, where it was made of that."""
    if _swaps_heads(node):
        turned: fx.Node = node.args[0]  # type: ignore[assignment]
        if is_call(turned, "reshape", "view", "unflatten"):
            source: fx.Node = turned.args[0]  # type: ignore[assignment]
            if len(shape(source)) == 3 and _same_front(source, turned):
                return source
    else:
        turned = program.call(_ATEN.transpose.int, node, 1, 2, like=node)
    return program.call(_ATEN.flatten.using_ints, turned, 2, like=node)


def _packed(rows: list[fx.Node]) -> tuple[fx.Node, None, None] | None:
    """The one tensor that queries, keys and values were split off, in this order."""
    splits = [x.args[0] for x in rows if getattr(x.target, "__name__", "") == "getitem"]
    if len(splits) != 3 or len(set(splits)) != 1 or not is_call(splits[0], "split_with_sizes", "split"):
        return None
    split = splits[0]
    if [x.args[1] for x in rows] != [0, 1, 2] or len(split.meta["val"]) != 3 or arguments(split)["dim"] not in (-1, 2):
        return None
    return split.args[0], None, None  # type: ignore[return-value]
