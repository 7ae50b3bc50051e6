"""GPTQ: input channels that are not rounded yet compensate errors of the others.

The weight W [O, I] is rounded one input channel at a time. The squared error of the outputs over the calibration text
is a quadratic form of H = X'X, which is the same for all output channels. The best correction of the remaining input
channels follows from a Cholesky factor of the inverse of H. Input channels with large inputs are rounded first, while
many channels remain to compensate their errors.
(Frantar et al., GPTQ, 2023; the order and the damping are those of its authors' later code.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.ops.quantized import levels_of
from ...kernels.ops.rounding import QuantizationParameters, nearest


def gptq(
    weight: Tensor,
    hessian: Tensor,
    parameters: QuantizationParameters,
    scheme: str,
    group_size: int,
    damping: float = 0.01,
    keep_zeros: bool = False,
    block: int = 128,
) -> Tensor:
    """Round a weight [O, I] to codes of the same shape, not packed.

    Args:
        hessian: X'X of the inputs, [I, I].
        parameters: the scales of each group. They do not change, so input channels may be rounded in any order.
        damping: the addend of the Hessian's diagonal, as a share of the diagonal's mean.
        keep_zeros: zeros of the weight stay zero, as a pruned weight needs; only the others compensate errors.
        block: number of input channels in a block. Channels after a block are corrected once per block.
    """
    order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor(hessian, order, damping)
    # [I, O], so that each input channel is contiguous.
    remaining = weight.float().T[order]
    groups = order // group_size
    spacing = parameters.spacing.expand(len(weight), max(groups) + 1).T[groups]
    zeros = None if parameters.zeros is None else parameters.zeros.T[groups]
    pruned = remaining == 0 if keep_zeros else None
    codes = []
    for start in range(0, len(remaining), block):
        end = min(start + block, len(remaining))
        errors = torch.empty(end - start, len(weight))
        for i in range(start, end):
            zero = None if zeros is None else zeros[i]
            wanted = remaining[i] if pruned is None else remaining[i].masked_fill(pruned[i], 0.0)
            codes.append(nearest(wanted, spacing[i], zero, scheme))
            value = levels_of(codes[-1], zero, scheme) * spacing[i]
            errors[i - start] = (remaining[i] - value) / factor[i, i]
            remaining[i + 1 : end].addr_(factor[i, i + 1 : end], errors[i - start], alpha=-1)
        remaining[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return torch.stack(codes)[order.argsort()].T.contiguous()


def inverse_factor(hessian: Tensor, order: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor of the damped Hessian's inverse, in float32.

    It is computed in float64, because the inverse may be ill-conditioned.

    Args:
        order: the order of input channels in the factor.
        damping: the addend of the Hessian's diagonal, as a share of the diagonal's mean.
    """
    ordered = hessian.double()[order][:, order]
    diagonal = ordered.diagonal()
    # An input channel that is always zero has no effect; 1 on the diagonal keeps it from affecting others.
    diagonal[diagonal == 0] = 1.0
    mean = diagonal.mean()
    assert mean.isfinite()  # otherwise the loop would not end
    while True:
        diagonal += damping * mean
        lower, failed = torch.linalg.cholesky_ex(ordered)
        if not failed:
            break
        damping *= 10  # nearly singular, and indefinite by rounding errors
    inverse = torch.cholesky_inverse(lower)
    return torch.linalg.cholesky(inverse, upper=True).float()
