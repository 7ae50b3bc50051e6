"""Fuse cached attention with the layout of its heads and with its rotation."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...ir.nodes import value_of
from ...ir.program import Miss, Program
from ...ir.stages import Stage
from ...kernels.ops import cached_attention, fused_attention, quant_cached_attention, rope
from ..base import Rewrite, miss
from ..queries import arguments, is_call, is_op, same_shape, shape
from .insert_kv_cache import InsertKvCache

_ATEN = torch.ops.aten


class FuseAttention(Rewrite):
    """Replace cached attention and the ops around it by one fused op.

    The op splits heads, rotates q and k, attends over the cache and joins heads.

    Example:  q, k, v = split(qkv);  each = transpose(reshape(each, [B, S, -1, D]), 1, 2)
              q, k = rope(q, positions, cos, sin), rope(k, positions, cos, sin)
              out, keys, values = cached_attention(q, k, v, keys, values, starts, scale)
              y = reshape(transpose(out, 1, 2), [B, S, -1])
    Becomes:  y, keys, values = fused_attention(qkv, None, None, keys, values, starts, heads, scale, cos, sin, ...)

    Queries, keys and values in another layout than [B, S, H*D] are first brought into it. A rotation stays a separate
    op if it differs between queries and keys, or if fused kernels don't support its size. A split stays a separate op
    if its parts are not exactly q, k and v in this order.

    Left alone: 1. a ring cache, in which a token's place is not its position; 2. chunks and alibi slopes, which the
    fused op does not support; 3. heads of keys and values whose sizes differ or are not supported by fused kernels;
    4. heads that are not joined to [B, S, H*D]; 5. quantized keys and values whose scales differ
    from token to token: fused kernels support only constant scales.

    Args:
        head_multiple: the target's fused kernel takes heads whose size is a multiple of this, and rotates as many
            pairs at once.
        largest_head: the size of the largest heads that it takes; None: any.
    """

    needs = Stage.CACHED
    after = (InsertKvCache,)

    def __init__(self, head_multiple: int, largest_head: int | None = None) -> None:
        self.head_multiple = head_multiple
        self.largest_head = largest_head

    def rewrite(self, program: Program, node: fx.Node) -> bool | Miss | None:
        if is_op(node, quant_cached_attention):
            return miss("its keys and values are quantized with a scale per token", node)
        if not is_op(node, cached_attention):
            return None
        call = cached_attention.bind(node.args, dict(node.kwargs))
        if call["ring"]:
            return miss("its cache is a ring cache", node)
        if call["chunk"] is not None or call["slopes"] is not None:
            return miss("it uses chunks or alibi slopes", node)
        if str(shape(call["k"])[3]) != str(shape(call["v"])[3]):
            return miss("the head sizes of its keys and values differ", node)
        unit = self.head_multiple
        if shape(call["k"])[3] % unit:
            return miss(f"the size of its heads is not a multiple of {unit}", node)
        if self.largest_head is not None and shape(call["k"])[3] > self.largest_head:
            return miss(f"the size of its heads is over {self.largest_head}", node)
        joined = _joined_heads(node)
        if joined is None:
            return miss("its heads are not joined to [B, S, H*D]", node)
        q, k, v = call["q"], call["k"], call["v"]
        heads = int(shape(q)[1])
        tables: tuple[Any, Any, bool] = (None, None, False)
        rotation = _same_rotation(q, k, call["starts"])
        if rotation and shape(rotation[0])[1] % unit == 0 and shape(q)[3] % (2 * unit) == 0:
            q, k, tables = q.args[0], k.args[0], rotation
        with program.graph.inserting_before(node):
            flat = [_with_joined_heads(program, x) for x in (q, k, v)]
            packed = _packed(flat)
            fused = program.call(
                fused_attention, *(packed or flat), call["k_cache"], call["v_cache"], call["starts"], heads,
                call["scale"], *tables, call["window"], call["softcap"], call["sinks"],
                call["k_scales"], call["v_scales"], like=node,
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
    """Return the op that joins the heads of the output, or None.

    None also if the output or its transpose has other users.
    """
    outputs = [user for user in node.users if user.args[1] == 0]
    if len(outputs) != 1 or len(outputs[0].users) != 1:
        return None
    (transposed,) = outputs[0].users
    if not _swaps_heads(transposed) or len(transposed.users) != 1:
        return None
    (joined,) = transposed.users
    if is_call(joined, "flatten"):
        return joined if len(shape(joined)) == 3 and _same_batch_and_length(joined, transposed) else None
    return joined if is_call(joined, "reshape", "view") else None


def _swaps_heads(node: object) -> bool:
    """True if a call swaps dims 1 and 2 of a tensor of four dims."""
    if is_call(node, "transpose"):
        return {int(dim) % 4 for dim in node.args[1:3]} == {1, 2}  # type: ignore[arg-type]
    return is_call(node, "permute") and [int(dim) % 4 for dim in node.args[1]] == [0, 2, 1, 3]  # type: ignore[union-attr,arg-type]


def _same_batch_and_length(one: fx.Node, other: fx.Node) -> bool:
    return [str(size) for size in shape(one)[:2]] == [str(size) for size in shape(other)[:2]]


def _same_rotation(q: Any, k: Any, starts: fx.Node) -> tuple[fx.Node, fx.Node, bool] | None:
    """Return (cos, sin, interleaved) of a rotation that q and k share, or None.

    Its positions must count from `starts`.
    """
    if not (is_op(q, rope) and is_op(k, rope)):
        return None
    one, other = (rope.bind(x.args, dict(x.kwargs)) for x in (q, k))
    if any(one[name] is not other[name] for name in ("positions", "cos", "sin", "interleaved")):
        return None
    positions = one["positions"]
    if not is_call(positions, "add") or not is_call(starts_2d := positions.args[0], "unsqueeze"):
        return None
    if starts_2d.args[0] is not starts or getattr(positions.args[1], "target", None) is not _ATEN.arange.default:
        return None
    return one["cos"], one["sin"], one["interleaved"]


def _with_joined_heads(program: Program, node: fx.Node) -> fx.Node:
    """Convert [B, H, S, D] to [B, S, H*D].

    If `node` was split from a value of this shape, return that value.
    """
    if _swaps_heads(node):
        transposed: fx.Node = node.args[0]  # type: ignore[assignment]
        if is_call(transposed, "reshape", "view", "unflatten"):
            source: fx.Node = transposed.args[0]  # type: ignore[assignment]
            if len(shape(source)) == 3 and _same_batch_and_length(source, transposed):
                return source
    else:
        transposed = program.call(_ATEN.transpose.int, node, 1, 2, like=node)
    return program.call(_ATEN.flatten.using_ints, transposed, 2, like=node)


def _packed(flat: list[fx.Node]) -> tuple[fx.Node, None, None] | None:
    """Return the tensor whose parts are exactly q, k and v in this order, or None."""
    splits = [x.args[0] for x in flat if getattr(x.target, "__name__", "") == "getitem"]
    if len(splits) != 3 or len(set(splits)) != 1 or not is_call(splits[0], "split_with_sizes", "split"):
        return None
    split = splits[0]
    if [x.args[1] for x in flat] != [0, 1, 2] or len(value_of(split)) != 3 or arguments(split)["dim"] not in (-1, 2):
        return None
    return split.args[0], None, None  # type: ignore[return-value]
