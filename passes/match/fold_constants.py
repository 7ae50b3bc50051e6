"""Makes weights of what is computed from weights and numbers alone."""

from __future__ import annotations

import operator
import re
from typing import Any

import torch
from torch import Tensor, fx

from ...ir.program import Miss, Program
from ...ir.weights import Call, Weight, cast
from ..base import Rewrite, miss
from ..queries import dtype, is_call

# A value of so few bytes is kept without asking what it is made from.
_SMALL = 1 << 16
_CASTS = ("to", "_to_copy", "type_as")
# Their values are whatever the memory held.
_UNSET = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted")


class FoldConstants(Rewrite):
    """Turn calls on weights into lazy weights, and small tensors made from numbers into constants.

    Nothing is computed here: the weight is the expression of the call, evaluated when a backend writes it.

    Example:  n = mul(x, add(norm, 1.0));  a, b = chunk(gate_up, 2);  m = where(mask, s, full([], -inf))
    Becomes:  n = mul(x, norm_add);  gate_up_chunk_0 and gate_up_chunk_1;  m = where(mask, s, constants.full)

    Left alone: 1. a value of more than 64 KiB and more than twice what it is made from: an outer product, an
    expand; 2. what depends on an input, if only for its size; 3. random numbers and memory that nothing has set.
    """

    def rewrite(self, program: Program, node: fx.Node) -> bool | Miss | None:
        value = node.meta["val"]
        call: Any = node
        output: Any = None
        if node.target is operator.getitem:
            call, output = node.args
        if not isinstance(value, Tensor) or not _is_aten(call) or is_call(call, *_UNSET):
            return None
        # Of a cast only the first argument has a value that counts; `type_as` has another for its dtype.
        inputs = call.all_input_nodes[:1] if is_call(call, *_CASTS) else call.all_input_nodes
        weights = [program.weights[str(source.target)] for source in inputs if source.op == "get_attr"]
        if len(weights) < len(inputs) or any(isinstance(size, torch.SymInt) for size in value.shape):
            return None
        if torch.Tag.nondeterministic_seeded in call.target.tags:
            return miss("it draws random numbers", node)
        if value.nbytes > max(_SMALL, 2 * sum(weight.nbytes for weight in weights)):
            return miss("its value is far larger than what it is made from", node)
        folded = _expression(program, call, output)
        name = _name(str(inputs[0].target), weights[0], folded) if inputs else f"constants.{_op(folded)}"
        program.replace(node, program.add_weight(name, folded, like=node))
        return True


def _is_aten(call: Any) -> bool:
    return isinstance(call.target, torch._ops.OpOverload) and call.target.namespace == "aten"


def _expression(program: Program, call: fx.Node, output: int | None) -> Weight:
    """The call with weights in place of its nodes."""
    if is_call(call, *_CASTS):  # `to` may name a device, which an expression doesn't have
        return cast(program.weights[str(call.all_input_nodes[0].target)], dtype(call))
    assert isinstance(call.target, torch._ops.OpOverload)
    args, kwargs = _with_weights(program, call.args), _with_weights(program, call.kwargs)
    return Call(call.target, args, kwargs, output)


def _with_weights(program: Program, value: Any) -> Any:
    """An argument with weights in place of nodes, and Python's own lists and dicts in place of the graph's."""
    if isinstance(value, fx.Node):
        return program.weights[str(value.target)]
    if isinstance(value, dict):
        return {name: _with_weights(program, x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_with_weights(program, x) for x in value]
        return tuple(items) if isinstance(value, tuple) else items
    return value


def _op(weight: Weight) -> str:
    """What was done last to arrive at this weight; nothing for one that was just given."""
    if not isinstance(weight, Call):
        return ""
    name = weight.target._schema.name.removeprefix("aten::").strip("_")
    return name if weight.output is None else f"{name}_{weight.output}"


def _name(given: str, weight: Weight, folded: Weight) -> str:
    """The name of the weight that it began with, and what was done last: `model.norm.weight_add`."""
    if folded is weight:
        return given
    began = re.sub(rf"_{_op(weight)}(_\d+)?$", "", given) if _op(weight) else given
    return f"{began}_{_op(folded)}"
