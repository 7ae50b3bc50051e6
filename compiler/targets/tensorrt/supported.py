"""Programs that TensorRT can't run, refused before any work on weights."""

from __future__ import annotations

import torch

from ....errors import LlmcError
from ....ir.nodes import value_of
from ....ir.program import Program, where
from ....kernels.ops import attention
from ....passes.queries import is_op
from .preflight import check_size


def check_attentions(program: Program) -> None:
    """Refuse a program with attentions that no kernel computes.

    Raises:
        LlmcError: TRT_UNSUPPORTED, naming the layer.
    """
    for node in program.nodes:
        if is_op(node, attention):
            call = attention.bind(node.args, dict(node.kwargs))
            head_dim = max(int(value_of(call[name]).shape[3]) for name in ("k", "v"))
            subject = f"The attention of {where(node) or 'the model'}"
            check_size(head_dim, program.max_seq_len, subject)
            _check_dtype(value_of(call["k"]).dtype, program, subject)


def _check_dtype(dtype: torch.dtype, program: Program, subject: str) -> None:
    """Refuse keys that are wider than the weights: a cache update writes numbers of the dtype computed in."""
    narrow = {weight.dtype for weight in program.weights.values()} & {torch.float16, torch.bfloat16}
    if narrow and dtype not in narrow:
        names = " and ".join(sorted(str(one).removeprefix("torch.") for one in narrow))
        raise LlmcError(
            "TRT_UNSUPPORTED",
            f"{subject} computes in {str(dtype).removeprefix('torch.')}, and the weights are in {names}.",
            "Store the model's buffers in the dtype of its weights, or compile it for another target.",
        )
