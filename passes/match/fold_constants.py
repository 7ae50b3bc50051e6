"""Fold calls on weights and numbers into lazy weights."""

from __future__ import annotations

import operator
import re
from typing import Any

import torch
from torch import Tensor, fx

from ...ir.nodes import value_of
from ...ir.program import Miss, Program
from ...ir.weights import Call, Weight, cast
from ..base import Rewrite, miss
from ..queries import dtype, is_call

# Values of up to this many bytes are folded whatever the size of their inputs.
_SMALL = 1 << 16
_CASTS = ("to", "_to_copy", "type_as")
# Ops that return uninitialized memory.
_UNSET = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted")


class FoldConstants(Rewrite):
    """Fold calls on weights into lazy weights.

    Small tensors made from numbers alone become constants. The pass computes nothing. The new weight is an expression,
    which is evaluated when a target writes it.

    Example:  n = mul(x, add(norm, 1.0));  a, b = chunk(gate_up, 2);  m = where(mask, s, full([], -inf))
    Becomes:  n = mul(x, norm_add);  gate_up_chunk_0 and gate_up_chunk_1;  m = where(mask, s, constants.full)

    Left alone: 1. a value of more than 64 KiB and more than twice the size of its inputs, as of an outer product or an
    expand; 2. a value that depends on a program input, even if only on its size; 3. random numbers and uninitialized
    memory.
    """

    def rewrite(self, program: Program, node: fx.Node) -> bool | Miss | None:
        value = value_of(node)
        call: Any = node
        output: Any = None
        if node.target is operator.getitem:
            call, output = node.args
        if not isinstance(value, Tensor) or not _is_aten(call) or is_call(call, *_UNSET):
            return None
        # A cast uses the value of its first argument only; the second one of `type_as` gives the dtype.
        inputs = call.all_input_nodes[:1] if is_call(call, *_CASTS) else call.all_input_nodes
        weights = [program.weights[str(source.target)] for source in inputs if source.op == "get_attr"]
        if len(weights) < len(inputs) or any(isinstance(size, torch.SymInt) for size in value.shape):
            return None
        if torch.Tag.nondeterministic_seeded in call.target.tags:
            return miss("it draws random numbers", node)
        if value.nbytes > max(_SMALL, 2 * sum(weight.nbytes for weight in weights)):
            return miss("its value is far larger than its inputs", node)
        folded = _expression(program, call, output)
        name = _name(str(inputs[0].target), weights[0], folded) if inputs else f"constants.{_op(folded)}"
        program.replace(node, program.add_weight(name, folded, like=node))
        return True


def _is_aten(call: Any) -> bool:
    return isinstance(call.target, torch._ops.OpOverload) and call.target.namespace == "aten"


def _expression(program: Program, call: fx.Node, output: int | None) -> Weight:
    """The lazy weight that computes output number `output` of a call on weights."""
    if is_call(call, *_CASTS):  # `to` may name a device, and an expression has none
        return cast(program.weights[str(call.all_input_nodes[0].target)], dtype(call))
    assert isinstance(call.target, torch._ops.OpOverload)
    args, kwargs = _with_weights(program, call.args), _with_weights(program, call.kwargs)
    return Call(call.target, args, kwargs, output)


def _with_weights(program: Program, value: Any) -> Any:
    """An argument with weights instead of nodes.

    The graph's own list and dict types become plain ones.
    """
    if isinstance(value, fx.Node):
        return program.weights[str(value.target)]
    if isinstance(value, dict):
        return {name: _with_weights(program, x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_with_weights(program, x) for x in value]
        return tuple(items) if isinstance(value, tuple) else items
    return value


def _op(weight: Weight) -> str:
    """The last op of a weight's expression; empty if it is no expression."""
    if not isinstance(weight, Call):
        return ""
    name = weight.target._schema.name.removeprefix("aten::").strip("_")
    return name if weight.output is None else f"{name}_{weight.output}"


def _name(name: str, weight: Weight, folded: Weight) -> str:
    """The name of a folded weight: the name of its first leaf and its last op.

    Args:
        name: of the first weight that was folded, such as `model.norm.weight` or `model.norm.weight_add`.
        weight: that first weight.
        folded: the new weight.
    """
    if folded is weight:
        return name
    stem = re.sub(rf"_{_op(weight)}(_\d+)?$", "", name) if _op(weight) else name
    return f"{stem}_{_op(folded)}"
