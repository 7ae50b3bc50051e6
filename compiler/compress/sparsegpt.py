"""SparseGPT: the columns that are left make good what the zeros of a column take away.

As in GPTQ the outputs over the calibration text change by a quadratic form of H = X'X, and a Cholesky factor of its
inverse tells how the columns behind one are best corrected. It also tells what a zero costs once that is done: the
square of the number over the square of the factor's diagonal. So the cheapest go, judged when all columns before
theirs are done: of a block of columns, or of a group of inputs. Columns keep their order, for groups must come whole.
(Frantar and Alistarh, SparseGPT, 2023.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gptq import inverse_factor
from .sparsity import Sparsity


def sparsegpt(weight: Tensor, hessian: Tensor, sparsity: Sparsity, damping: float = 0.01, block: int = 128) -> Tensor:
    """The weight [O, I] with zeros, in float32: in each row, each block or group has the same number of them.

    Args:
        hessian: X'X of the inputs, [I, I].
        damping: what is added to the hessian's diagonal, as a share of its mean.
        block: number of input channels that are pruned before the remaining ones are corrected, a multiple of every
            group; without groups, their zeros are chosen together.
    """
    factor = inverse_factor(hessian, torch.arange(len(hessian)), damping)
    # A zero is free where no input ever comes.
    prices = hessian.diagonal().sign() / factor.diagonal().square()
    # Inputs are rows here, so that one lies in one piece.
    left = weight.float().T.clone(memory_format=torch.contiguous_format)
    for start in range(0, len(left), block):
        end = min(start + block, len(left))
        errors = torch.empty(end - start, len(weight))
        together = sparsity.group or block
        for row in range(start, end):
            if (row - start) % together == 0:
                chosen = slice(row, min(row + together, end))
                gone = sparsity.lowest(left[chosen].square().mul_(prices[chosen, None]).T).T
            value = left[row].masked_fill(gone[(row - start) % together], 0.0)
            errors[row - start] = (left[row] - value) / factor[row, row]
            left[row + 1 : end].addr_(factor[row, row + 1 : end], errors[row - start], alpha=-1)
            left[row] = value
        left[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return left.T.contiguous()
