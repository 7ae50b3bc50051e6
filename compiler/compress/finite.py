"""Check that a checkpoint's weights are finite, before hours are spent on them."""

from __future__ import annotations

import torch

from ...errors import LlmcError
from ...ir.program import Program


def check_finite(program: Program) -> None:
    """Refuse a model with NaN or infinite weights.

    A single one would spoil the whole weight when it is quantized.

    Raises:
        LlmcError: WEIGHTS_NOT_FINITE.
    """
    seen = set()
    for name, weight in program.weights.items():
        if weight.is_constant:
            continue
        for leaf in weight.leaves():
            if leaf.key in seen or not leaf.dtype.is_floating_point:
                continue
            seen.add(leaf.key)
            value = leaf.evaluate()
            # A sum needs no memory and is not finite if a number isn't. It may also overflow: then check each number.
            if not torch.isfinite(value.sum(dtype=torch.float32)) and not torch.isfinite(value.float()).all():
                raise LlmcError(
                    "WEIGHTS_NOT_FINITE",
                    f"{leaf}, which {name} is computed from, holds NaN or infinite numbers.",
                    "Fix the checkpoint: only finite weights can be quantized.",
                )
