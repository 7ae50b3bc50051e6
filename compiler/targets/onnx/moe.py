"""Experts in plain ONNX: a loop over the experts that are selected."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import torch
from onnx import helper

from ....ir.weights import transpose
from .activations import activation, gate_by
from .graph import Value, element
from .lower import Lowering, Table, WeightValue


def moe(
    g: Lowering,
    x: Value,
    ids: Value,
    weights: Value,
    w_in: Value,
    w_out: Value,
    b_in: Value | None,
    b_out: Value | None,
    act: str,
    gated: bool,
    alpha: float,
    limit: float | None,
    offset: float,
) -> str:
    """Write a loop: each selected expert processes its tokens and adds the results.

    So the weights of a selected expert are read once for all its tokens, and those of other experts not at all. A
    batched product over gathered weights, one per pair of token and expert, is no faster for four pairs and takes
    twice as long for eight.
    """
    # Ids that select no expert become E, which sorts last and is not counted in `trips`.
    invalid = g.constant(int(w_in.shape[0]))
    is_valid = g.op("And", g.op("GreaterOrEqual", ids, g.constant(0)), g.op("Less", ids, invalid))
    selected = g.op("Unique", g.op("Where", is_valid, ids, invalid), sorted=1)
    trips = g.op("ReduceSum", g.cast(g.op("Less", selected, invalid), torch.int64), keepdims=0)
    into, out_of = _transposed(g, w_in), _transposed(g, w_out)
    token_weights, zero = g.cast(weights, x.dtype), g.constant(0, x.dtype)

    def product(tokens: str, weight: Value, bias: Value | None, expert: str) -> str:
        y = g.op("MatMul", tokens, g.op("Gather", weight, expert))
        return y if bias is None else g.op("Add", y, g.op("Gather", bias, expert))

    def iteration(i: str, go_on: str, total: str) -> tuple[str, str]:
        expert = g.op("Gather", selected, i)
        hit = g.op("Equal", ids, expert)
        has_hit = g.cast(g.op("ReduceMax", g.cast(hit, torch.int32), g.constant([1]), keepdims=0), torch.bool)
        tokens = g.op("Squeeze", g.op("NonZero", has_hit), g.constant([0]))  # the indices of the expert's tokens
        factor = g.op("ReduceSum", g.op("Where", hit, token_weights, zero), g.constant([1]), keepdims=1)  # [T, 1]
        hidden = product(g.op("Gather", x, tokens), into, b_in, expert)
        if gated:
            gate, up = g.op("Split", hidden, axis=-1, num_outputs=2, count=2)
            hidden = gate_by(g, gate, up, act, alpha, limit, offset, x.dtype)
        else:
            hidden = activation(g, hidden, act, alpha, x.dtype)
        y = g.op("Mul", product(hidden, out_of, b_out, expert), g.op("Gather", factor, tokens))
        # No token occurs twice, so the order of the additions is fixed.
        sums = g.op("ScatterND", total, g.op("Unsqueeze", tokens, g.constant([1])), y, reduction="add")
        return g.op("Identity", go_on), sums

    zeros = g.op("Expand", zero, g.op("Shape", x))
    return g.op("Loop", trips, None, zeros, body=_body(g, x.dtype, iteration))


def _transposed(g: Lowering, weight: Value) -> Value:
    """Return the experts' matrices transposed: [E, O, I] -> [E, I, O]."""
    if isinstance(weight, WeightValue):
        return g.weight(f"{weight}.transposed", transpose(weight.weight, 1, 2))
    return Value(g.op("Transpose", weight, perm=[0, 2, 1]), weight.dtype)


def _body(g: Lowering, dtype: torch.dtype, iteration: Callable[[str, str, str], tuple[str, str]]) -> onnx.GraphProto:
    """Return the graph of an iteration, which carries one value of `dtype`.

    It may read values of the outer graph.
    """
    names = [g._name(kind) for kind in ("turn", "go_on", "total")]
    with g.subgraph() as nodes:
        results = iteration(*names)
    flag, carried = element(torch.bool), element(dtype)
    inputs = [
        helper.make_tensor_value_info(names[0], element(torch.int64), []),
        helper.make_tensor_value_info(names[1], flag, []),
        helper.make_tensor_value_info(names[2], carried, None),
    ]
    outputs = [helper.make_tensor_value_info(n, k, None) for n, k in zip(results, (flag, carried), strict=True)]
    return helper.make_graph(nodes, g._name("expert"), inputs, outputs)


MOE: Table = {"llmc.moe": moe}
