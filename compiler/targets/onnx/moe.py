"""A block of experts in plain ONNX: a loop over those that are visited."""

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
    """Each expert that is visited takes its rows and adds what it makes of them to the sum.

    So its weights are read once however many rows it has, and those of the others not at all. One batched product
    over the weights of all visits, gathered, is no faster for four visits and half as fast for eight.
    """
    # E stands for no expert, so that there is always one to list.
    none = g.constant(int(w_in.shape[0]))
    named = g.op("And", g.op("GreaterOrEqual", ids, g.constant(0)), g.op("Less", ids, none))
    visited = g.op("Unique", g.op("Where", named, ids, none), sorted=1)
    trips = g.op("ReduceSum", g.cast(g.op("Less", visited, none), torch.int64), keepdims=0)
    into, out_of = _turned(g, w_in), _turned(g, w_out)
    share, zero = g.cast(weights, x.dtype), g.constant(0, x.dtype)

    def product(rows: str, weight: Value, bias: Value | None, expert: str) -> str:
        y = g.op("MatMul", rows, g.op("Gather", weight, expert))
        return y if bias is None else g.op("Add", y, g.op("Gather", bias, expert))

    def turn(i: str, go_on: str, total: str) -> tuple[str, str]:
        expert = g.op("Gather", visited, i)
        hit = g.op("Equal", ids, expert)
        seen = g.cast(g.op("ReduceMax", g.cast(hit, torch.int32), g.constant([1]), keepdims=0), torch.bool)
        rows = g.op("Squeeze", g.op("NonZero", seen), g.constant([0]))
        part = g.op("ReduceSum", g.op("Where", hit, share, zero), g.constant([1]), keepdims=1)  # [T, 1]
        hidden = product(g.op("Gather", x, rows), into, b_in, expert)
        if gated:
            gate, up = g.op("Split", hidden, axis=-1, num_outputs=2, count=2)
            hidden = gate_by(g, gate, up, act, alpha, limit, offset, x.dtype)
        else:
            hidden = activation(g, hidden, act, alpha, x.dtype)
        y = g.op("Mul", product(hidden, out_of, b_out, expert), g.op("Gather", part, rows))
        # No row is there twice, so that the order of the additions is given.
        sums = g.op("ScatterND", total, g.op("Unsqueeze", rows, g.constant([1])), y, reduction="add")
        return g.op("Identity", go_on), sums

    nothing = g.op("Expand", zero, g.op("Shape", x))
    return g.op("Loop", trips, None, nothing, body=_body(g, x.dtype, turn))


def _turned(g: Lowering, weight: Value) -> Value:
    """The experts' matrices so that rows are multiplied from the left."""
    if isinstance(weight, WeightValue):
        return g.weight(f"{weight}.transposed", transpose(weight.weight, 1, 2))
    return Value(g.op("Transpose", weight, perm=[0, 2, 1]), weight.dtype)


def _body(g: Lowering, dtype: torch.dtype, turn: Callable[[str, str, str], tuple[str, str]]) -> onnx.GraphProto:
    """The graph of one turn, which reads values from around it and carries one of `dtype`."""
    outer, g.nodes = g.nodes, []
    names = [g._name(kind) for kind in ("turn", "go_on", "total")]
    results = turn(*names)
    nodes, g.nodes = g.nodes, outer
    flag, carried = element(torch.bool), element(dtype)
    inputs = [
        helper.make_tensor_value_info(names[0], element(torch.int64), []),
        helper.make_tensor_value_info(names[1], flag, []),
        helper.make_tensor_value_info(names[2], carried, None),
    ]
    outputs = [helper.make_tensor_value_info(n, k, None) for n, k in zip(results, (flag, carried), strict=True)]
    return helper.make_graph(nodes, g._name("expert"), inputs, outputs)


MOE: Table = {"llmc.moe": moe}
