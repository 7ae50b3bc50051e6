"""Remove calls that change nothing and calls that a later one makes redundant."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ...ir.nodes import value_of
from ...ir.program import Miss, Program, op_name
from ..base import Rewrite, miss
from ..queries import arguments, dtype, is_call, number, same_shape, shape

aten = torch.ops.aten


class RemoveNoOps(Rewrite):
    """Remove calls that return their input, and spell every view `reshape`.

    A reshape accepts any strides, so calls that only change the memory layout can be removed too.

    Example:  c = contiguous(transpose(t, 1, 2));  v = view(c, [B, S, -1]);  w = view(v, [B, S, H, D])
              s = slice(w, 0, 0, 2**63 - 1);  d = dropout(s, 0.1, False);  y = to(to(d, float64), float32)
    Becomes:  y = reshape(transpose(t, 1, 2), [B, S, H, D])

    Left alone: 1. a call that changes a size, the dtype or any value: a pad by [1, -1], a roll, a swap of equal sizes,
    a division that rounds; 2. a first cast that is lossy; 3. a call that changes strides on which a later op depends,
    such as `view_as_complex`.
    """

    def rewrite(self, program: Program, node: fx.Node) -> bool | Miss | None:
        if not isinstance(value_of(node), Tensor):
            return None
        same = _same_as(node)
        if same is not None:
            if _disturbs(program, node, value_of(same)):
                return miss("it changes strides on which a later op depends", node)
            program.replace(node, same)
            return True
        target, source, wanted = _shortened(node)
        if target is None:
            return None
        if source is not node.args[0] and _disturbs(program, node, program.infer(target, (source, wanted), {})):
            return miss("it changes strides on which a later op depends", node)
        program.replace_with(node, target, source, wanted)
        return True


def _same_as(node: fx.Node) -> fx.Node | None:
    """A node before this one that has the same value, shape and dtype."""
    for find in (_unchanged_input, _only_part, _reshaped_back, _permuted_back, _cast_back):
        same = find(node)
        if same is not None and same_shape(same, node) and dtype(same) == dtype(node):
            return same
    return None


# Ops that return their first input if the shape and dtype of the result are those of that input. A slice as long as its
# input starts at 0 and has step 1, all repeats are 1, and all further tensors of a `cat` are empty.
_SAME_IF_SHAPED_ALIKE = frozenset({
    "_reshape_alias", "_to_copy", "_unsafe_view", "alias", "cat", "clone", "contiguous", "detach", "expand",
    "expand_as", "flatten", "lift_fresh", "lift_fresh_copy", "narrow", "repeat", "reshape", "slice", "squeeze", "to",
    "type_as", "unflatten", "view",
})  # fmt: skip
_SAME_UNDER: dict[str, Callable[[dict[str, Any]], bool]] = {
    "add": lambda a: number(a["other"]) == 0,
    "sub": lambda a: number(a["other"]) == 0,
    "mul": lambda a: number(a["other"]) == 1,
    "div": lambda a: number(a["other"]) == 1 and a.get("rounding_mode") is None,
    "pow": lambda a: number(a["exponent"]) == 1,
    "dropout": lambda a: a["p"] == 0 or a["train"] is False,
    "pad": lambda a: _all_zero(a["pad"]),
    "constant_pad_nd": lambda a: _all_zero(a["pad"]),
    "roll": lambda a: _all_zero(a["shifts"]),
    # The repeats must be one number: different repeats could add up to the same size.
    "repeat_interleave": lambda a: number(a["repeats"]) == 1,
}


def _all_zero(values: Any) -> bool:
    return all(number(v) == 0 for v in (values if isinstance(values, (list, tuple)) else [values]))


def _unchanged_input(node: fx.Node) -> fx.Node | None:
    """The input of a call that returns it if shape and dtype are kept, or None."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
        return None
    name = op_name(node).removeprefix("aten.")
    if name in _SAME_IF_SHAPED_ALIKE or (name in _SAME_UNDER and _SAME_UNDER[name](arguments(node))):
        return _first(node)
    return None


def _first(node: fx.Node) -> fx.Node | None:
    value = node.args[0]
    if isinstance(value, (list, tuple)):
        value = value[0]
    return value if isinstance(value, fx.Node) else None


def _only_part(node: fx.Node) -> fx.Node | None:
    """The input of the split of which `node` is a part, or None.

    A part of the input's size is the whole input.
    """
    if node.target is operator.getitem and is_call(node.args[0], "split", "split_with_sizes", "chunk", "tensor_split"):
        return _first(node.args[0])
    return None


_RESHAPES = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten._reshape_alias.default})
_SAME_ORDER = _RESHAPES | {
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
}


def _reshaped_back(node: fx.Node) -> fx.Node | None:
    """The nearest node in the chain of reshapes before `node` that has its shape."""
    source: Any = node
    while source.target in _SAME_ORDER:
        source = source.args[0]
        if same_shape(source, node):
            return source
    return None


def _permuted_back(node: fx.Node) -> fx.Node | None:
    """The nearest node before a chain of transposes with the same order of dims."""
    source: Any = node
    order = list(range(len(shape(node))))
    while (step := _permutation(source)) is not None:
        order = [step[dim] for dim in order]
        source = source.args[0]
        if order == sorted(order):
            return source
    return None


def _permutation(node: fx.Node) -> list[int] | None:
    """The input dim of each output dim of a permutation, or None for another call."""
    rank = len(shape(node))
    order = list(range(rank))
    if is_call(node, "transpose", "swapaxes", "swapdims"):
        a, b = (int(dim) % max(rank, 1) for dim in node.args[1:3])  # type: ignore[arg-type]
        if rank:
            order[a], order[b] = order[b], order[a]
        return order
    if is_call(node, "permute"):
        return [int(dim) % rank for dim in node.args[1]]  # type: ignore[union-attr,arg-type]
    return order[::-1] if is_call(node, "t") else None


_CASTS = ("to", "_to_copy", "type_as")


def _cast_back(node: fx.Node) -> fx.Node | None:
    """The input of a cast, before the lossless casts that precede it, or None."""
    return _before_wider_casts(node) if is_call(node, *_CASTS) else None


def _before_wider_casts(node: fx.Node) -> Any:
    """The input of a cast, before the lossless casts that precede it."""
    source: Any = node.args[0]
    while is_call(source, *_CASTS) and _holds(dtype(source), dtype(source.args[0])):  # type: ignore[arg-type]
        source = source.args[0]
    return source


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """True if the dtype `wide` can hold every value of the dtype `narrow`."""
    if wide == narrow or narrow == torch.bool:
        return True
    if wide == torch.bool or wide.is_complex or narrow.is_complex:
        return False
    if narrow.is_floating_point:
        if not wide.is_floating_point:
            return False
        a, b = torch.finfo(wide), torch.finfo(narrow)
        return a.eps <= b.eps and a.max >= b.max and a.smallest_normal <= b.smallest_normal
    ints = torch.iinfo(narrow)
    if wide.is_floating_point:
        return ints.max <= 2 / torch.finfo(wide).eps and ints.max <= torch.finfo(wide).max
    return torch.iinfo(wide).max >= ints.max and torch.iinfo(wide).min <= ints.min


def _shortened(node: fx.Node) -> tuple[Any, Any, Any]:
    """A single reshape or cast that does what `node` and the calls before it do.

    Returns its target, its input and its second argument; the target is None if `node` is already that call.
    """
    if node.target in _RESHAPES:
        source: Any = node.args[0]
        while source.target in _SAME_ORDER:
            source = source.args[0]
        is_shortest = node.target is aten.reshape.default and source is node.args[0]
        return (None if is_shortest else aten.reshape.default), source, node.args[1]
    if is_call(node, *_CASTS):
        source = _before_wider_casts(node)
        return (None if source is node.args[0] else aten.to.dtype), source, dtype(node)
    return None, None, None


_READ_STRIDES = (aten.as_strided.default, aten.view_as_complex.default, aten.view.dtype, aten.view_as.default)
# Ops whose results have the same strides whatever the strides of their inputs.
_FIXED_LAYOUT = ("linear", "matmul", "mm", "addmm", "bmm", "embedding")


def _disturbs(program: Program, node: fx.Node, value: Tensor) -> bool:
    """True if replacing `node` by `value` changes strides that a later op uses."""
    if list(map(str, value.stride())) == list(map(str, value_of(node).stride())):
        return False
    pending = [user for target in _READ_STRIDES for user in program.graph.find_nodes(op="call_function", target=target)]
    seen: set[fx.Node] = set()
    while pending:
        for source in pending.pop().all_input_nodes:
            if source is node:
                return True
            if source not in seen and not is_call(source, *_FIXED_LAYOUT):
                seen.add(source)
                pending.append(source)
    return False
