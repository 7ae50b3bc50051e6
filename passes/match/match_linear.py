"""Replace products with a weight by the linear op."""

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
    """Replace every product with a weight by one op, whatever the weight's layout.

    Example:  y = reshape(addmm(b, reshape(x, [-1, I]), w), [B, S, O])        x [B, S, I], w [I, O]
    Becomes:  y = linear(x, w_t, b)                                           w_t = transpose(w) [O, I]

    Example:  y = add(matmul(x, w), b)
    Becomes:  y = linear(x, w_t, b)

    Left alone: 1. both operands depend on the input; 2. the weight has three dims, or is the left operand; 3. the addmm
    has a scale; 4. the added tensor is no vector over the output channels, or the product has other users.
    """

    after = (RemoveNoOps, FoldConstants)

    def rewrite(self, program: Program, node: fx.Node) -> bool | Miss | None:
        if is_call(node, "linear"):
            x, weight, bias = (arguments(node)[name] for name in ("input", "weight", "bias"))
            return _replace(program, node, x, weight, bias, is_output_major=True)
        if is_call(node, "mm", "matmul"):
            x, weight = arguments(node).values()
            return _replace(program, node, x, weight, None, is_output_major=False)
        if is_call(node, "addmm"):
            values = arguments(node)
            if values["alpha"] != 1 or values["beta"] != 1:
                return miss("the addmm scales its operands", node)
            if _sizes(values["self"]) != _sizes(node)[-1:]:
                return miss("the tensor added by addmm is no vector over the output channels", node)
            return _replace(program, node, values["mat1"], values["mat2"], values["self"], is_output_major=False)
        if is_call(node, "add"):
            return _add_bias(program, node)
        return None


def _replace(
    program: Program, node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None, is_output_major: bool
) -> bool | Miss | None:
    """Replace the product `node` by a linear op.

    Args:
        is_output_major: the weight is [O, I], as the op needs it; otherwise it is [I, O].
    """
    value = program.weight_of(weight)
    if value is None:
        if program.weight_of(x) is not None:
            return miss("the weight is the left operand", node)
        return miss("the weight is computed", node) if is_output_major else None
    if len(value.shape) != 2:
        return miss(f"the weight has {len(value.shape)} dims", node)
    if not is_output_major:
        weight = _transposed(program, weight, value)
    replace_unflattened(program, node, linear, x, 1, weight, *([] if bias is None else [bias]))
    return True


def _transposed(program: Program, node: fx.Node, value: Weight) -> fx.Node:
    """The transpose of a weight.

    The transpose of a transposed weight is the original, so an LM head that multiplies by `embedding.T` shares the
    embedding's weight.
    """
    transposed = _untransposed(value) or transpose(value)
    for name, known in program.weights.items():
        if (known.shape, known.dtype) == (transposed.shape, transposed.dtype) and known.key == transposed.key:
            return program.add_weight(name, known, like=node)
    return program.add_weight(f"{node.target}_t", transposed, like=node)


def _untransposed(value: Weight) -> Weight | None:
    """The weight of which `value` is the transpose, or None if it is no transpose."""
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


def replace_unflattened(program: Program, node: fx.Node, op: Op, flat: fx.Node, kept: int, *others: fx.Node) -> None:
    """Replace `node` by `op(flat, *others)`, if possible without flattening.

    If the leading dims of `flat` were merged for this call only, and all users of `node` split them again, the op is
    applied to the tensor before the flattening.

    Args:
        kept: the number of last dims of `flat` that are not merged.
    """
    whole = _before_flattening(node, flat, kept)
    if whole is None:
        program.replace_with(node, op, flat, *others)
        return
    with program.graph.inserting_before(node):
        y = program.call(op, whole, *others, like=node)
    for user in list(node.users):
        if same_shape(user, y):
            program.replace(user, y)
        else:
            user.replace_input_with(node, y)
    program.graph.erase_node(node)


def _before_flattening(node: fx.Node, flat: fx.Node, kept: int) -> fx.Node | None:
    """The tensor before the reshape to `flat` [N, ...], or None.

    The reshape must only merge leading dims, and all users of `node` must split them again.
    """
    if not is_call(flat, "reshape", "view") or len(shape(flat)) != 1 + kept:
        return None
    whole: Any = flat.args[0]
    leading, rest = _sizes(whole)[: len(shape(whole)) - kept], _sizes(whole)[len(shape(whole)) - kept :]
    if rest != _sizes(flat)[1:]:
        return None
    users = list(node.users)
    if all(is_call(user, "reshape", "view") and _sizes(user)[: len(leading)] == leading for user in users):
        return whole
    return None


def _sizes(node: fx.Node) -> list[str]:
    return list(map(str, shape(node)))


def _add_bias(program: Program, node: fx.Node) -> bool | Miss | None:
    """Move a weight that `node` adds to a linear op into the op's bias."""
    if arguments(node)["alpha"] != 1:
        return None
    for product, bias in _products(node):
        value = program.weight_of(bias)
        if value is None:
            continue
        values = linear.bind(product.args, product.kwargs)
        if values["bias"] is not None or not same_shape(product, node) or dtype(bias) != dtype(product):
            continue
        if value.shape != (shape(product)[-1],):
            return miss("the added tensor is no vector over the output channels", node)
        if len(product.users) > 1:
            return miss("the product without the bias has other users", node)
        replace_unflattened(program, node, linear, values["x"], 1, values["weight"], bias)
        return True
    return None


def _products(node: fx.Node) -> Iterator[tuple[fx.Node, Any]]:
    return ((a, b) for a, b in operands(node) if is_op(a, linear))
