"""Experts in plain ONNX equal the op's meaning, for any number of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from check_lowering import lowered, run_in_onnx
from check_pass import capture, inputs
from torch import Tensor, nn

from llmc.compiler.targets.onnx.aten import ATEN
from llmc.compiler.targets.onnx.moe import MOE
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


@pytest.mark.parametrize("name", FORMS)
def test_experts_equal_the_meaning_of_the_op(name: str) -> None:
    program = capture(Block(**FORMS[name]))
    run = run_in_onnx(program, {**ATEN, **MOE})
    for size in SIZES:
        sample = inputs(*size)
        torch.testing.assert_close(run(*sample)[0], program(*sample), rtol=1e-5, atol=1e-5)


def test_the_output_is_zero_if_no_expert_is_selected() -> None:
    run = run_in_onnx(capture(Block(act="silu")), {**ATEN, **MOE})
    for length in (1, 20):
        tokens = torch.zeros(1, length, dtype=torch.int64)  # token 0 selects the ids -1
        assert torch.equal(run(tokens, tokens)[0], torch.zeros(1, length, HIDDEN))


def test_each_weight_is_stored_once(tmp_path: Path) -> None:
    model = lowered(capture(Block(act="silu")), {**ATEN, **MOE}, tmp_path)
    stored = [t.name for t in model.graph.initializer if list(t.dims)[:1] == [EXPERTS]]
    assert sorted(stored) == ["b_in", "b_out", "w_in.transposed", "w_out.transposed"]
