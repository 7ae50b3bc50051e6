"""A block of experts in every form of the op, for the lowerings of each table."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmc.kernels.ops import moe

EXPERTS, HIDDEN, INNER, SELECTED = 5, 8, 6, 2


class Block(nn.Module):
    """Experts whose ids depend on the tokens, range from -1 to E and may repeat."""

    def __init__(self, biases: bool = True, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.options = options
        width = INNER * (2 if options.get("gated", True) else 1)
        self.w_in = nn.Parameter(torch.randn(EXPERTS, width, HIDDEN))
        self.w_out = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER))
        self.b_in = nn.Parameter(torch.randn(EXPERTS, width)) if biases else None
        self.b_out = nn.Parameter(torch.randn(EXPERTS, HIDDEN)) if biases else None

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = (tokens[..., None] * (1.7 + torch.arange(HIDDEN))).sin().flatten(0, 1)
        ids = ((tokens.flatten()[:, None] * torch.arange(1, 2 * SELECTED, 2)) % (EXPERTS + 2)) - 1
        weights = (ids * 0.3).cos()
        y = moe(x, ids, weights, self.w_in, self.w_out, self.b_in, self.b_out, **self.options)
        return y.reshape(*tokens.shape, HIDDEN)


FORMS: dict[str, dict[str, Any]] = {
    "gated": {"act": "silu"},
    "gated, without biases": {"act": "gelu_tanh", "biases": False},
    "not gated": {"act": "relu2", "gated": False},
    "not gated, without biases": {"act": "gelu", "gated": False, "biases": False},
    "limit and offset": {"act": "silu", "alpha": 1.702, "limit": 0.9, "offset": 1.0},
    "alpha, not gated": {"act": "silu", "gated": False, "alpha": 2.5},
    "sigmoid": {"act": "sigmoid", "limit": 0.5},
}
# One token; some tokens, which do not select all experts; many tokens, which do.
SIZES = ((1, 1), (1, 3), (4, 16))
