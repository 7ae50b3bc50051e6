"""Replace layer norms, called or spelled out, by the `layer_norm` op."""

from __future__ import annotations

from typing import Any

from torch import fx

from ...ir.program import Miss, Program, op_name
from ...kernels.ops import layer_norm
from ..base import Rewrite, miss
from ..queries import arguments, behind_casts, behind_widening, dtype, is_call
from .norm_parts import affine, divisions, mean_of, mean_square, over_last_dim, place, same_value


class MatchLayerNorm(Rewrite):
    """Replace a layer norm over the last dim by one op.

    Example:  y = aten.layer_norm(x, [64], w, b, eps)
         or:  c = sub(x, mean(x, -1, keepdim));  v = mean(pow(c, 2), -1, keepdim)
              y = add(mul(w, mul(c, rsqrt(add(v, eps)))), b)
    Becomes:  y = layer_norm(x, w, b, eps)

    The variance may also be `var` of x or of c. Weight and bias may each be absent.

    Left alone: 1. it is over several dims or not over the last one; 2. the variance is an unbiased estimate; 3. eps is
    added to the root, or is not a number; 4. mean, variance and numerator are of different values; 5. the dtype
    of the result is not that of the input before or after its casts.
    """

    def rewrite(self, program: Program, node: fx.Node) -> bool | Miss | None:
        if is_call(node, "layer_norm", "native_layer_norm"):
            return _rename(program, node)
        outcome: Miss | None = None
        for division in divisions(node):
            x = _centred(arguments(node)["self"] if isinstance(division, Miss) else division.numerator)
            if x is None:
                continue
            if isinstance(x, Miss):
                outcome = x
                continue
            if isinstance(division, Miss):
                outcome = division
                continue
            measured = _variance(division.power)
            if isinstance(measured, Miss):
                outcome = measured
            elif measured is not None and not same_value(measured, x):
                outcome = miss("mean and variance are of different values", node)
            elif measured is not None:
                return _replace(program, node, x, division.eps)
        return outcome


def _centred(node: Any) -> fx.Node | Miss | None:
    """Find the value from which `node` subtracts its mean over the last dim."""
    node = behind_casts(node)
    if not is_call(node, "sub") or node.kwargs or len(node.all_input_nodes) != 2:
        return None
    x, mean = node.all_input_nodes
    if found := _var_mean(mean, 1):
        averaged: fx.Node | Miss | None = found["self"]
    else:
        averaged = mean_of(mean)
    if isinstance(averaged, fx.Node):
        return x if same_value(averaged, x) else None
    return averaged


def _variance(power: fx.Node) -> fx.Node | Miss | None:
    """Find the value whose variance over the last dim is `power`."""
    power = behind_casts(power)
    values = arguments(power) if is_call(power, "var") else _var_mean(power, 0)
    if values is None:
        squared = mean_square(power)
        return _centred(squared) if isinstance(squared, fx.Node) else squared
    if values.get("unbiased", values.get("correction")) not in (False, 0):
        return miss("the variance is an unbiased estimate", power)
    if not over_last_dim(values["self"], values["dim"], values["keepdim"]):
        return miss("it does not reduce the last dim alone with keepdim", power)
    centred = _centred(values["self"])
    return centred if isinstance(centred, fx.Node) else values["self"]


def _var_mean(node: fx.Node, output: int) -> dict[str, Any] | None:
    """The arguments of the `var_mean` call if `node` is this output of one, or None."""
    if op_name(node) == "getitem" and node.args[1] == output and is_call(call := node.all_input_nodes[0], "var_mean"):
        return arguments(call)
    return None


def _replace(program: Program, normed: fx.Node, x: fx.Node, eps: float) -> bool | Miss:
    scaled = affine(program, normed, shifts=True)
    placed = place(scaled.end, (behind_widening(x), x))
    if placed is None:
        return miss(f"the input of the norm is {dtype(x)}, its result {dtype(scaled.end)}", scaled.end)
    x, end = placed
    program.replace_with(end, layer_norm, x, scaled.weight, scaled.bias, eps)
    return True


def _rename(program: Program, node: fx.Node) -> bool | Miss:
    """Replace a call of one of torch's layer norms."""
    values = arguments(node)
    if len(values["normalized_shape"]) != 1:
        return miss("it is over several dims", node)
    operands = (values["input"], values["weight"], values["bias"], values["eps"])
    if is_call(node, "layer_norm"):
        program.replace_with(node, layer_norm, *operands)
        return True
    normed = [user for user in node.users if user.args[1] == 0]
    for user in normed:
        program.replace_with(user, layer_norm, *operands)
    return bool(normed)
