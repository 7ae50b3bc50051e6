"""Experts without a loop: every expert processes every token, and the weights of the selected ones sum the results."""

from __future__ import annotations

import torch

from ....ir.weights import transpose
from ..onnx.activations import activation, gate_by
from ..onnx.graph import Value
from ..onnx.lower import Lowering, WeightValue


def moe(
    g: Lowering, x: Value, ids: Value, weights: Value, w_in: Value, w_out: Value, b_in: Value | None,
    b_out: Value | None, act: str, gated: bool, alpha: float, limit: float | None, offset: float,
) -> str:  # fmt: skip
    """Write batched products over all experts, [E, T, ...].

    TensorRT has no loop whose trips depend on data inside a fused plan, and its own expert layer builds for none of
    the GPUs that a plan can be built for without one.
    """
    experts = int(w_in.shape[0])
    hidden = _product(g, g.op("Unsqueeze", x, g.constant([0])), w_in, b_in)
    if gated:
        gate, up = g.op("Split", hidden, axis=-1, num_outputs=2, count=2)
        hidden = gate_by(g, gate, up, act, alpha, limit, offset, x.dtype)
    else:
        hidden = activation(g, hidden, act, alpha, x.dtype)
    y = _product(g, hidden, w_out, b_out)
    chosen = g.op("Equal", g.op("Unsqueeze", ids, g.constant([-1])), g.constant(torch.arange(experts)))  # [T, K, E]
    factors = g.op("Unsqueeze", g.cast(weights, x.dtype), g.constant([-1]))
    by_choice = g.op("Where", chosen, factors, g.constant(0.0, x.dtype))
    by_expert = g.op("ReduceSum", by_choice, g.constant([1]), keepdims=0)  # [T, E]
    factors = g.op("Unsqueeze", g.op("Transpose", by_expert, perm=[1, 0]), g.constant([-1]))  # [E, T, 1]
    return g.op("ReduceSum", g.op("Mul", y, factors), g.constant([0]), keepdims=0)


def _product(g: Lowering, x: str, weight: Value, bias: Value | None) -> str:
    """Return x [1 or E, T, I] times the experts' matrices [E, O, I], plus their biases [E, O]."""
    if isinstance(weight, WeightValue):
        turned: Value | str = g.weight(f"{weight}.transposed", transpose(weight.weight, 1, 2))
    else:
        turned = g.op("Transpose", weight, perm=[0, 2, 1])
    y = g.op("MatMul", x, turned)
    return y if bias is None else g.op("Add", y, g.op("Unsqueeze", bias, g.constant([1])))
