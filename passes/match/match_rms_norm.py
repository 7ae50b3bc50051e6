"""Replace RMS norms, called or spelled out, by the `rms_norm` op."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from ...ir.program import Miss, Program
from ...kernels.ops import rms_norm
from ...kernels.ops.precision import accumulator
from ..base import Rewrite, miss
from ..queries import arguments, behind_widening, dtype, is_call
from .match_layer_norm import MatchLayerNorm
from .norm_parts import affine, divisions, length_over_root_width, mean_square, place, same_value


class MatchRmsNorm(Rewrite):
    """Replace an RMS norm over the last dim by one op.

    Example:  wide = to(x, f32);  r = rsqrt(add(mean(pow(wide, 2), -1, keepdim), eps))
              y = mul(w, to(mul(wide, r), x.dtype))
    Becomes:  y = rms_norm(x, w, eps)

    The root may be `rsqrt`, `pow(-0.5)`, a division by `sqrt` or by `vector_norm * width ** -0.5`. The weight may be
    computed from parameters and numbers, as in `1 + w`. Any other factor stays a `mul` after the norm.

    Left alone: 1. eps is added to the root, or is not a number; 2. the squares are summed instead of averaged; 3. the
    mean is over other dims than the last; 4. the numerator is not the squared value; 5. the dtype of the result is not
    that of the input before or after its casts.
    """

    # A layer norm contains an RMS norm of the centred input. It must become `layer_norm` first.
    after = (MatchLayerNorm,)

    def rewrite(self, program: Program, node: fx.Node) -> bool | Miss | None:
        if is_call(node, "rms_norm"):
            return _rename(program, node)
        outcome = None
        for reading in _readings(node):
            if isinstance(reading, Miss):
                outcome = reading
            else:
                return _replace(program, node, reading)
        return outcome


@dataclass(frozen=True)
class _Norm:
    """`numerator` divided by the root mean square of `squared`.

    Both are the same value, possibly in different dtypes.
    """

    squared: fx.Node
    numerator: fx.Node
    eps: float


def _readings(node: fx.Node) -> Iterator[_Norm | Miss]:
    """All ways to read `node` as an RMS norm without weight, and near misses."""
    if is_call(node, "div"):
        values = arguments(node)
        if x := length_over_root_width(values["other"]):
            yield _Norm(x, values["self"], 0.0) if same_value(values["self"], x) else _other_value(node)
    for division in divisions(node):
        if isinstance(division, Miss):
            yield division
            continue
        squared = mean_square(division.power)
        if isinstance(squared, Miss):
            yield squared
        elif squared is not None:
            same = same_value(division.numerator, squared)
            yield _Norm(squared, division.numerator, division.eps) if same else _other_value(node)


def _other_value(node: fx.Node) -> Miss:
    return miss("the numerator is not the squared value", node)


def _replace(program: Program, normed: fx.Node, norm: _Norm) -> bool | Miss:
    scaled = affine(program, normed, shifts=False)
    placed = place(scaled.end, (behind_widening(norm.squared), norm.squared, norm.numerator))
    if placed is None:
        return miss(f"the input of the norm is {dtype(norm.squared)}, its result {dtype(scaled.end)}", scaled.end)
    x, end = placed
    program.replace_with(end, rms_norm, x, scaled.weight, norm.eps)
    return True


def _rename(program: Program, node: fx.Node) -> bool | Miss:
    """Replace a call of torch's RMS norm."""
    values = arguments(node)
    if len(values["normalized_shape"]) != 1:
        return miss("it is over several dims", node)
    x, eps = values["input"], values["eps"]
    if eps is None:
        eps = torch.finfo(accumulator(dtype(x))).eps
    program.replace_with(node, rms_norm, x, values["weight"], eps)
    return True
