"""The `llmc` dialect: the meaning of each op, defined once.

Nothing here imports from the rest of the package.
"""

from __future__ import annotations

from .attention import attention
from .cached_attention import cached_attention
from .embedding import embedding, quant_embedding, take_rows
from .fused_attention import fused_attention
from .gated_act import gated_act
from .linear import linear, quant_linear
from .moe import moe
from .norms import add_rms_norm, layer_norm, rms_norm
from .op import all_ops, op_of
from .quant_cached_attention import quant_cached_attention
from .rope import rope
from .rounding import round_weight

__all__ = [
    "add_rms_norm",
    "all_ops",
    "attention",
    "cached_attention",
    "embedding",
    "fused_attention",
    "gated_act",
    "layer_norm",
    "linear",
    "moe",
    "op_of",
    "quant_cached_attention",
    "quant_embedding",
    "quant_linear",
    "rms_norm",
    "rope",
    "round_weight",
    "take_rows",
]
