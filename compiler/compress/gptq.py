"""GPTQ: the error of each rounded column is made good by the columns that are not rounded yet.

The weight W [O, I] is rounded input by input. What its rounding changes in the outputs, over the calibration text, is a
quadratic form of H = X'X, the same for all rows; the best correction of the columns that are left follows from a
Cholesky factor of its inverse. Columns whose inputs are large come first, while there are many left to help.
(Frantar et al., GPTQ, 2023; the order and the damping are those of its authors' later code.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.ops.quantized import levels_of
from ...kernels.ops.rounding import GridScales, nearest


def gptq(
    weight: Tensor,
    hessian: Tensor,
    steps: GridScales,
    scheme: str,
    group_size: int,
    damping: float = 0.01,
    keep_zeros: bool = False,
    block: int = 128,
) -> Tensor:
    """The codes of a weight, unpacked, [O, I].

    Args:
        hessian: X'X of the inputs, [I, I].
        steps: the spacing of each group, which stays as it is: so groups need no order of their own when columns have.
        damping: what is added to the hessian's diagonal, as a share of its mean.
        keep_zeros: a zero of the weight stays one, whatever it could make good: for a weight that is pruned.
        block: number of input channels that are rounded before the remaining ones are corrected.
    """
    order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor(hessian, order, damping)
    # Inputs are rows here, so that one lies in one piece.
    left = weight.float().T[order]
    groups = order // group_size
    spacing = steps.spacing.expand(len(weight), max(groups) + 1).T[groups]
    zeros = None if steps.zeros is None else steps.zeros.T[groups]
    pruned = left == 0 if keep_zeros else None
    codes = []
    for start in range(0, len(left), block):
        end = min(start + block, len(left))
        errors = torch.empty(end - start, len(weight))
        for row in range(start, end):
            zero = None if zeros is None else zeros[row]
            wanted = left[row] if pruned is None else left[row].masked_fill(pruned[row], 0.0)
            codes.append(nearest(wanted, spacing[row], zero, scheme))
            value = levels_of(codes[-1], zero, scheme) * spacing[row]
            errors[row - start] = (left[row] - value) / factor[row, row]
            left[row + 1 : end].addr_(factor[row, row + 1 : end], errors[row - start], alpha=-1)
        left[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return torch.stack(codes)[order.argsort()].T.contiguous()


def inverse_factor(hessian: Tensor, order: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse, in this order of columns; in float64, for inverses are touchy."""
    ordered = hessian.double()[order][:, order]
    diagonal = ordered.diagonal()
    # An input that is always zero matters nothing; one on the diagonal keeps it from mattering elsewhere.
    diagonal[diagonal == 0] = 1.0
    mean = diagonal.mean()
    assert mean.isfinite()  # or no damping would be enough
    while True:
        diagonal += damping * mean
        lower, failed = torch.linalg.cholesky_ex(ordered)
        if not failed:
            break
        damping *= 10  # a nearly singular matrix that rounding has made indefinite
    inverse = torch.cholesky_inverse(lower)
    return torch.linalg.cholesky(inverse, upper=True).float()
