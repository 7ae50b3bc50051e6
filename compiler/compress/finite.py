"""Whether a checkpoint's weights are numbers at all, asked before hours are spent on them."""

from __future__ import annotations

import torch

from ...errors import LlmcError
from ...ir.program import Program


def check_finite(program: Program) -> None:
    """Refuse a model that holds NaN or infinite weights: one would spoil a whole matrix when it is rounded."""
    seen = set()
    for name, weight in program.weights.items():
        if weight.is_constant:
            continue
        for leaf in weight.leaves():
            if leaf.key in seen or not leaf.dtype.is_floating_point:
                continue
            seen.add(leaf.key)
            value = leaf.evaluate()
            # A sum is not finite if a number isn't, and takes no memory; large finite ones are told apart.
            if not torch.isfinite(value.sum(dtype=torch.float32)) and not torch.isfinite(value.float()).all():
                raise LlmcError(
                    "WEIGHTS_NOT_FINITE",
                    f"{leaf}, which is in {name}, holds NaN or infinite numbers.",
                    "Mend the checkpoint: what it says can't be rounded.",
                )
