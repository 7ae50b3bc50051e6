"""SparseGPT: input channels that are not pruned yet compensate others' zeros.

As in GPTQ, the squared error of the outputs is a quadratic form of H = X'X, and a Cholesky factor of its inverse
gives the best correction of the input channels after the current one. It also gives the cost of a zero after
this correction: the square of the weight over the square of the factor's diagonal. In each block of input channels, or
in each group, the weights of least cost become zero; they are chosen when all channels before the block are done. Input
channels stay in order, because the channels of a group must be adjacent.
(Frantar and Alistarh, SparseGPT, 2023.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gptq import inverse_factor
from .sparsity import Sparsity


def sparsegpt(weight: Tensor, hessian: Tensor, sparsity: Sparsity, damping: float = 0.01, block: int = 128) -> Tensor:
    """Prune a weight [O, I], and return it in float32.

    In each output channel, each block or group has the same number of zeros.

    Args:
        hessian: X'X of the inputs, [I, I].
        damping: the addend of the Hessian's diagonal, as a share of the diagonal's mean.
        block: number of input channels in a block, a multiple of the group. Channels after a block are corrected once
            per block. Without groups, the zeros of a block are chosen together.
    """
    factor = inverse_factor(hessian, torch.arange(len(hessian)), damping)
    # A zero costs nothing where the input is always zero.
    costs = hessian.diagonal().sign() / factor.diagonal().square()
    # [I, O], so that each input channel is contiguous.
    remaining = weight.float().T.clone(memory_format=torch.contiguous_format)
    for start in range(0, len(remaining), block):
        end = min(start + block, len(remaining))
        errors = torch.empty(end - start, len(weight))
        size = sparsity.group or block
        for i in range(start, end):
            if (i - start) % size == 0:
                channels = slice(i, min(i + size, end))
                is_pruned = sparsity.lowest(remaining[channels].square().mul_(costs[channels, None]).T).T
            value = remaining[i].masked_fill(is_pruned[(i - start) % size], 0.0)
            errors[i - start] = (remaining[i] - value) / factor[i, i]
            remaining[i + 1 : end].addr_(factor[i, i + 1 : end], errors[i - start], alpha=-1)
            remaining[i] = value
        remaining[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return remaining.T.contiguous()
