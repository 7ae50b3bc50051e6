"""Finds linear layers in the spellings that models use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from ...ir.program import Miss, Program
from ...ir.weights import Call, Weight, transpose
from ...kernels.ops import linear
from ...kernels.ops.op import Op
from ..base import Rewrite, miss
from ..queries import arguments, dtype, is_call, is_op, operands, same_shape, shape
from .fold_constants import FoldConstants
from .remove_no_ops import RemoveNoOps

aten = torch.ops.aten


class MatchLinear(Rewrite):
    """Make one op of every product with a weight, whichever way the weight lies.

    Example:  y = reshape(addmm(b, reshape(x, [-1, I]), w), [B, S, O])        x [B, S, I], w [I, O]
    Becomes:  y = linear(x, w_t, b)                                           w_t = transpose(w) [O, I]

    Example:  y = add(matmul(x, w), b)
    Becomes:  y = linear(x, w_t, b)

    Left alone: 1. both operands depend on the input; 2. the weight has three dims, or stands on the left; 3. addmm
    scales what it adds; 4. what is added is no vector of the layer's outputs, or the product has other readers.
    """

    after = (RemoveNoOps, FoldConstants)

    def rewrite(self, program: Program, node: fx.Node) -> bool | Miss | None:
        if is_call(node, "linear"):
            x, weight, bias = (arguments(node)[name] for name in ("input", "weight", "bias"))
            return _replace(program, node, x, weight, bias, lies_as_outputs=True)
        if is_call(node, "mm", "matmul"):
            x, weight = arguments(node).values()
            return _replace(program, node, x, weight, None, lies_as_outputs=False)
        if is_call(node, "addmm"):
            given = arguments(node)
            if given["alpha"] != 1 or given["beta"] != 1:
                return miss("addmm scales what it adds", node)
            if _sizes(given["self"]) != _sizes(node)[-1:]:
                return miss("what addmm adds is no vector of the layer's outputs", node)
            return _replace(program, node, given["mat1"], given["mat2"], given["self"], lies_as_outputs=False)
        if is_call(node, "add"):
            return _add_bias(program, node)
        return None


def _replace(
    program: Program, node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None, lies_as_outputs: bool
) -> bool | Miss | None:
    value = program.weight_of(weight)
    if value is None:
        if program.weight_of(x) is not None:
            return miss("the weight stands on the left", node)
        return miss("the weight is computed", node) if lies_as_outputs else None
    if len(value.shape) != 2:
        return miss(f"the weight has {len(value.shape)} dims", node)
    if not lies_as_outputs:
        weight = _turned(program, weight, value)
    put_over_rows(program, node, linear, x, 1, weight, *([] if bias is None else [bias]))
    return True


def _turned(program: Program, node: fx.Node, value: Weight) -> fx.Node:
    """The weight with its two dims swapped: what was transposed to get it, where that is how it came about.

    So a head that multiplies by `embedding.T` goes on sharing the embedding's weight.
    """
    turned = _untransposed(value) or transpose(value)
    for name, known in program.weights.items():
        if (known.shape, known.dtype) == (turned.shape, turned.dtype) and known.key == turned.key:
            return program.add_weight(name, known, like=node)
    return program.add_weight(f"{node.target}_t", turned, like=node)


def _untransposed(value: Weight) -> Weight | None:
    """What a weight is the transpose of, if that is what it is."""
    while isinstance(value, Call) and value.target is aten.clone.default:
        value = value.args[0]
    if not isinstance(value, Call):
        return None
    if value.target in (aten.t.default, aten.numpy_T.default, aten.mT.default):
        return value.args[0]
    if value.target is aten.transpose.int and {dim % 2 for dim in value.args[1:]} == {0, 1}:
        return value.args[0]
    if value.target is aten.permute.default and [dim % 2 for dim in value.args[1]] == [1, 0]:
        return value.args[0]
    return None


def put_over_rows(program: Program, node: fx.Node, op: Op, flat: fx.Node, kept: int, *others: fx.Node) -> None:
    """Put `op(flat, *others)` where `node` stands, or the op on what was flattened for this call alone.

    Args:
        kept: the last dims of `flat` that the op doesn't treat as rows.
    """
    whole = _before_flattening(node, flat, kept)
    if whole is None:
        program.replace_with(node, op, flat, *others)
        return
    with program.graph.inserting_before(node):
        y = program.call(op, whole, *others, like=node)
    for reader in list(node.users):
        if same_shape(reader, y):
            program.replace(reader, y)
        else:
            reader.replace_input_with(node, y)
    program.graph.erase_node(node)


def _before_flattening(node: fx.Node, flat: fx.Node, kept: int) -> fx.Node | None:
    """What `flat` [N, ...] is a reshape of, if only its rows were merged and all readers of `node` part them again."""
    if not is_call(flat, "reshape", "view") or len(shape(flat)) != 1 + kept:
        return None
    whole: Any = flat.args[0]
    rows, rest = _sizes(whole)[: len(shape(whole)) - kept], _sizes(whole)[len(shape(whole)) - kept :]
    if rest != _sizes(flat)[1:]:
        return None
    readers = list(node.users)
    if all(is_call(reader, "reshape", "view") and _sizes(reader)[: len(rows)] == rows for reader in readers):
        return whole
    return None


def _sizes(node: fx.Node) -> list[str]:
    return list(map(str, shape(node)))


def _add_bias(program: Program, node: fx.Node) -> bool | Miss | None:
    if arguments(node)["alpha"] != 1:
        return None
    for product, bias in _products(node):
        value = program.weight_of(bias)
        if value is None:
            continue
        given = linear.bind(product.args, product.kwargs)
        if given["bias"] is not None or not same_shape(product, node) or dtype(bias) != dtype(product):
            continue
        if value.shape != (shape(product)[-1],):
            return miss("what is added is no vector of the layer's outputs", node)
        if len(product.users) > 1:
            return miss("the product is read without what is added, too", node)
        put_over_rows(program, node, linear, given["x"], 1, given["weight"], bias)
        return True
    return None


def _products(node: fx.Node) -> Iterator[tuple[fx.Node, Any]]:
    return ((a, b) for a, b in operands(node) if is_op(a, linear))
