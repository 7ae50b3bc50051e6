"""Look up embeddings by token, and select positions of sequences."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .op import op
from .precision import widen
from .quantized import dequantize


@op
def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Look up the embeddings [..., H] of tokens `ids` [...] in `weight` [V, H]."""
    return F.embedding(ids, weight)


def _embedding_shape(
    ids: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor | None, scheme: str, group_size: int,
    multiples: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return scales.new_empty(*ids.shape, weight.shape[1] * (2 if scheme in ("int4", "nf4") else 1))


@op(fake=_embedding_shape)
def quant_embedding(
    ids: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    scheme: str,
    group_size: int,
    multiples: Tensor | None = None,
) -> Tensor:
    """Look up embeddings in a quantized table; the result has the dtype of `scales`.

    `quant_linear` describes the codes, scales, zero points and multiples.
    """
    tokens = ids.flatten()
    wide_scales = widen(scales[tokens])
    token_zeros, token_multiples = (None if part is None else part[tokens] for part in (zeros, multiples))
    vectors = dequantize(
        weight[tokens], wide_scales, token_zeros, scheme, group_size, wide_scales.dtype, token_multiples
    ).to(scales.dtype)
    return vectors.view(*ids.shape, vectors.shape[1])


@op
def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Select positions of each sequence: x [B, S, ...] -> [B, R, ...].

    Args:
        rows: [R] int64, indices of positions, the same for all sequences. Negative ones count from the end.
    """
    return x.index_select(1, torch.where(rows < 0, rows + x.shape[1], rows))
