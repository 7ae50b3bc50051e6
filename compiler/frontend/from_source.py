"""From a model that was found to the program that was captured."""

from __future__ import annotations

from torch import nn

from ...errors import UsageError
from ...ir.program import Program
from ...ir.weights import cast
from .capture import trace
from .sources import ModelSource

DEFAULT_MAX_SEQ_LEN = 2048


def program_of(source: ModelSource, module: nn.Module, max_seq_len: int | None = None) -> Program:
    """Capture the module that `source` has built; no weight is read.

    Args:
        max_seq_len: longest sequence to serve; by default the model's own limit, 2048 at most.
    """
    if max_seq_len is None:
        known = getattr(source.config, "max_position_embeddings", None) or DEFAULT_MAX_SEQ_LEN
        max_seq_len = min(known, DEFAULT_MAX_SEQ_LEN)
    if max_seq_len < 1:
        raise UsageError("MAX_SEQ_LEN_INVALID", f"max_seq_len is {max_seq_len}.", "Give 1 or more.")
    # Each tensor in the dtype that the module computes in: some parts stay in float32 whatever the others are in.
    dtypes = {name: value.dtype for name, value in module.state_dict(keep_vars=True).items()}
    weights = {name: cast(weight, dtypes[name]) for name, weight in source.weights(module).items() if name in dtypes}
    return trace(module, weights, source.name, max_seq_len)
