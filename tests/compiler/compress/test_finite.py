"""NaN and infinite weights are refused before anything is computed."""

from __future__ import annotations

import math

import pytest
import torch
from check_pass import capture
from torch import Tensor, nn
from zoo.tiny import tiny_model

import llmc
from llmc.compiler.compress.finite import check_finite
from llmc.compiler.targets.ort.target import OrtTarget
from llmc.errors import LlmcError
from llmc.kernels.ops import embedding, linear


class Model(nn.Module):
    def __init__(self, value: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.randn(31, 16))
        self.head = nn.Parameter(torch.randn(31, 16).to(dtype))
        with torch.no_grad():
            self.head[3, 5] = value
        self.mask = nn.Buffer(torch.full((1,), -math.inf))

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = embedding(tokens, self.embed) + torch.exp(self.mask)
        return linear(x, self.head.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_refused(value: float, dtype: torch.dtype) -> None:
    with pytest.raises(LlmcError, match="WEIGHTS_NOT_FINITE") as caught:
        check_finite(capture(Model(value, dtype)))
    assert "head" in caught.value.what


def test_large_weights_are_finite() -> None:
    """Only their sum overflows. Infinite constants, as in a mask, are allowed."""
    model = Model(3e38)
    with torch.no_grad():
        model.head[4, 5] = 3e38
    check_finite(capture(model))


def test_compile_refuses_early(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = math.nan
    monkeypatch.setattr(OrtTarget, "lower", lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(LlmcError, match="WEIGHTS_NOT_FINITE"):
        llmc.compile(model, tmp_path / "out", quantize="int4")
    assert not (tmp_path / "out").exists()
