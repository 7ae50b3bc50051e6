"""Reading rows: of a table by token, of a batch by length."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .op import op
from .precision import widen
from .quantized import dequantize


@op
def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """The rows of `weight` [V, H] that `ids` names: [..., H]."""
    return F.embedding(ids, weight)


def _rows(
    ids: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor | None, scheme: str, group_size: int,
    multiples: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return scales.new_empty(*ids.shape, weight.shape[1] * (2 if scheme in ("int4", "nf4") else 1))


@op(fake=_rows)
def quant_embedding(
    ids: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    scheme: str,
    group_size: int,
    multiples: Tensor | None = None,
) -> Tensor:
    """The rows of a rounded table that `ids` names, in the dtype of `scales`; see `quant_linear` for the codes."""
    flat = ids.flatten()
    steps = widen(scales[flat])
    points, times = (None if part is None else part[flat] for part in (zeros, multiples))
    rows = dequantize(weight[flat], steps, points, scheme, group_size, steps.dtype, times).to(scales.dtype)
    return rows.view(*ids.shape, rows.shape[1])


@op
def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Some rows of each sequence: x [B, S, ...] -> [B, R, ...].

    Args:
        rows: [R] int64, counted from the end where negative; the same for all sequences.
    """
    return x.index_select(1, torch.where(rows < 0, rows + x.shape[1], rows))
