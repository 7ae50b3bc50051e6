"""Layouts of attention heads: split, merged with the batch, repeated or scaled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import fx

from ...ir.program import Program
from ...kernels.ops.precision import accumulator
from ..queries import arguments, dtype, is_call, only_user, same_shape, shape
from .token_independent import Unknown

aten = torch.ops.aten

_VIEWS = ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze")


class Form(Enum):
    """Layout of a tensor of heads."""

    PARTED = "[B, H, S, D]"
    MERGED = "[B * H, S, D]"
    SINGLE = "[B, S, D]"


@dataclass(frozen=True)
class Scaling:
    """A call that multiplies queries or keys by one number and has no other user.

    Attributes:
        node: the call.
        source: the tensor that it multiplies.
    """

    node: fx.Node
    source: fx.Node
    factor: float


@dataclass(frozen=True)
class Heads:
    """A tensor of heads and its layout.

    Attributes:
        count: the number of heads.
        is_transposed: the last two dims are [D, S] instead of [S, D].
    """

    node: fx.Node
    form: Form
    count: int
    is_transposed: bool = False

    @property
    def length(self) -> str:
        return str(shape(self.node)[-1 if self.is_transposed else -2])

    @property
    def batch(self) -> str:
        return str(shape(self.node)[0])

    def part(self, program: Program, like: fx.Node) -> fx.Node:
        """The tensor as [B, H, S, D]; missing calls go to the graph's insertion point."""
        node = self.node
        if self.form is Form.MERGED:
            node = program.call(aten.unflatten.int, node, 0, [-1, self.count], like=like)
        elif self.form is Form.SINGLE:
            node = program.call(aten.unsqueeze.default, node, 1, like=like)
        return program.call(aten.transpose.int, node, -2, -1, like=like) if self.is_transposed else node


def heads_of(node: fx.Node, batch: torch.SymInt, scalings: Sequence[Scaling] = ()) -> Heads:
    """The heads of a tensor [B, H, S, D], [B, S, D] or [B * H, S, D].

    Raises `Unknown` for any other layout.

    Args:
        batch: the size of the program's batch.
        scalings: calls to skip; the heads are those of their inputs.
    """
    node = _bare(node, scalings)
    sizes = shape(node)
    if len(sizes) == 4 and isinstance(sizes[1], int):
        return Heads(node, Form.PARTED, sizes[1])
    if len(sizes) == 3:
        if str(sizes[0]) == str(batch):
            return Heads(node, Form.SINGLE, 1)
        if is_call(node, *_VIEWS):
            inner = node.args[0]
            assert isinstance(inner, fx.Node)
            whole = shape(inner)
            if len(whole) == 4 and isinstance(whole[1], int) and list(map(str, whole[2:])) == list(map(str, sizes[1:])):
                return Heads(_bare(inner, scalings), Form.PARTED, whole[1])
        if count := _merged_count(node, batch):
            return Heads(node, Form.MERGED, count)
    raise Unknown("heads and batch are merged in an unknown order", node)


def _merged_count(node: fx.Node, batch: torch.SymInt) -> int | None:
    """H of a tensor [B * H, S, D] that is a view of [S, B, H * D], or None.

    `torch.nn.MultiheadAttention` makes such tensors.
    """
    view = swapped(node, 0, 1)
    if not is_call(view, *_VIEWS):
        return None
    whole = shape(view.args[0])  # type: ignore[arg-type]
    width = shape(node)[2]
    if len(whole) != 3 or str(whole[1]) != str(batch) or not isinstance(whole[2], int) or whole[2] % width:
        return None
    count = whole[2] // width
    same = str(shape(node)[0]) == str(batch * count) and str(whole[0]) == str(shape(node)[1])
    return count if same else None


def keys_of(node: fx.Node, batch: torch.SymInt, scalings: Sequence[Scaling] = ()) -> Heads:
    """The heads of keys that are transposed, [.., D, S]; arguments as for `heads_of`."""
    node = _bare(node, scalings)
    if (inner := swapped(node)) is not None:
        return heads_of(inner, batch, scalings)
    heads = heads_of(node, batch, scalings)
    if (inner := swapped(heads.node)) is not None:
        return heads_of(inner, batch, scalings)
    return Heads(heads.node, heads.form, heads.count, is_transposed=True)


def _bare(node: fx.Node, scalings: Sequence[Scaling]) -> fx.Node:
    """The node before scalings, copies and lossless casts."""
    source = {scaling.node: scaling.source for scaling in scalings}
    while (inner := widened(source.get(node, node))) is not node:
        node = inner
    return node


def swapped(node: Any, a: int = -2, b: int = -1) -> fx.Node | None:
    """The input of a call that only swaps dims a and b, or None for any other call."""
    if is_call(node, "mT", "t", "numpy_T") and (a, b) == (-2, -1):
        return node.args[0]  # type: ignore[return-value]
    if not is_call(node, "transpose", "permute"):
        return None
    rank = len(shape(node))
    order = list(range(rank))
    order[a], order[b] = order[b], order[a]
    if is_call(node, "permute"):
        actual = [int(d) % rank for d in arguments(node)["dims"]]
    else:
        actual = list(range(rank))
        i, j = arguments(node)["dim0"], arguments(node)["dim1"]
        actual[i], actual[j] = actual[j], actual[i]
    return node.args[0] if actual == order else None  # type: ignore[return-value]


def widened(node: fx.Node) -> fx.Node:
    """The node before a chain of copies, full slices and lossless casts."""
    while is_call(node, "contiguous", "clone", "alias", "to", "_to_copy", "type_as", "float", "slice"):
        inner = node.args[0]
        assert isinstance(inner, fx.Node)
        if not same_shape(node, inner):
            break
        if dtype(node) not in (dtype(inner), accumulator(dtype(inner))) or not dtype(inner).is_floating_point:
            break
        node = inner
    return node


def repeated(heads: Heads) -> Heads:
    """The heads before each was repeated for a group of query heads.

    Returns `heads` itself if they are not repeated.
    """
    node = heads.node
    if heads.form is not Form.PARTED or heads.is_transposed:
        return heads
    if is_call(node, "repeat_interleave") and arguments(node).get("dim") in (1, -3) and isinstance(node.args[1], int):
        source = node.args[0]
    elif is_call(node, "view", "reshape", "_unsafe_view", "flatten"):
        source = _before_expansion(node)
    else:
        return heads
    if not isinstance(source, fx.Node) or len(shape(source)) != 4 or not isinstance(shape(source)[1], int):
        return heads
    return Heads(widened(source), Form.PARTED, shape(source)[1])


def _before_expansion(node: fx.Node) -> fx.Node | None:
    """The tensor x [B, H, S, D] whose heads are repeated by an expansion, or None.

    The call is `reshape(expand(x[:, :, None], [B, H, n, S, D]), [B, H * n, S, D])`.
    """
    expand = widened(node.args[0])  # type: ignore[arg-type]
    if not is_call(expand, "expand", "broadcast_to") or len(shape(expand)) != 5:
        return None
    narrow = widened(expand.args[0])  # type: ignore[arg-type]
    wide, one = [str(s) for s in shape(expand)], [str(s) for s in shape(narrow)]
    if one != [*wide[:2], "1", *wide[3:]] or [str(s) for s in shape(node)[2:]] != wide[3:]:
        return None
    source = narrow.args[0]
    kept = isinstance(source, fx.Node) and [str(s) for s in shape(source)] == [*wide[:2], *wide[3:]]
    return source if is_call(narrow, "unsqueeze", "view", "reshape") and kept else None  # type: ignore[return-value]


def scaled_by(node: fx.Node, number: Callable[[Any], float | None]) -> list[Scaling]:
    """The scalings of queries or keys before their product, the last one first.

    Args:
        node: the queries or keys as the product reads them.
        number: returns the number that an argument is at every size, or None.
    """
    scalings: list[Scaling] = []
    while only_user(node):
        source = node.args[0]
        if is_call(node, "mul", "div"):
            sides = [(node.args[0], node.args[1])]
            sides += [(node.args[1], node.args[0])] if is_call(node, "mul") else []
            for x, factor in sides:
                value = number(factor)
                if isinstance(x, fx.Node) and value is not None and value > 0 and same_shape(x, node):
                    if dtype(x) != dtype(node) or arguments(node).get("rounding_mode"):
                        return scalings
                    scalings.append(Scaling(node, x, value if is_call(node, "mul") else 1 / value))
                    source = x
                    break
            else:
                return scalings
        elif not is_call(node, "transpose", "permute", "mT", *_VIEWS) and widened(node) is node:
            return scalings
        assert isinstance(source, fx.Node)
        node = source
    return scalings
