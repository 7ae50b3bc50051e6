"""CheckTokenIndependence refuses ops that mix tokens outside of attention."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from check_pass import VOCAB, capture
from torch import Tensor, nn
from torch.nn import functional as F

import llmc
from llmc.ir.stages import Stage
from llmc.kernels.ops import embedding, linear
from llmc.passes.cache.check_token_independence import CheckTokenIndependence
from llmc.passes.match.unify_op_names import UnifyOpNames

HIDDEN = 8


class Model(nn.Module):
    """An embedding, `mix` on values [B, S, 8], and an LM head."""

    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB)
        self.mix = mix

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return linear(self.mix(embedding(input_ids, self.table.weight)), self.head.weight)


def checked(mix: Callable[[Tensor], Tensor]) -> int:
    return CheckTokenIndependence()(capture(Model(mix), first=[UnifyOpNames()], stage=Stage.OPTIMIZED)).matches


INDEPENDENT: dict[str, Callable[[Tensor], Tensor]] = {
    "elementwise": lambda x: torch.sigmoid(x) * 3 + x,
    "heads and back": lambda x: x.view(*x.shape[:2], 2, 4).transpose(1, 2).transpose(1, 2).reshape(x.shape),
    "softmax inside a token": lambda x: x.softmax(-1),
    "sort inside a token": lambda x: x.sort(-1).values,
    "batch and sequence in one dim": lambda x: x.reshape(-1, HIDDEN).relu().view(x.shape),
    "four values for each token": lambda x: x.reshape(-1, 2).softmax(-1).view(x.shape),
    "all tokens four times in one dim": lambda x: (
        x.reshape(-1, HIDDEN).repeat(4, 1).view(4, -1, HIDDEN).sum(0).view(x.shape)
    ),
    "top-k and scatter": lambda x: torch.zeros_like(x).scatter(-1, x.topk(2, -1).indices, 1.0),
    "an index into a dim of size 1": lambda x: x + x[..., :1].gather(-1, (x[..., :1] > 99).long()),
    "constants of the sequence length": lambda x: x + torch.ones(x.shape[1], HIDDEN),
}
DEPENDENT: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "running sum": (lambda x: x.cumsum(1), "aten.cumsum mixes tokens"),
    "mean over the sequence": (lambda x: x + x.mean(1, keepdim=True), "aten.mean mixes tokens"),
    "convolution": (
        lambda x: F.conv1d(F.pad(x.transpose(1, 2), (2, 0)), torch.ones(HIDDEN, 1, 3), groups=HIDDEN).transpose(1, 2),
        "positions cannot be identified",
    ),
    "the token before": (lambda x: x + torch.roll(x, 1, 1), "aten.roll mixes tokens"),
    "the sequence reversed": (lambda x: x.flip(1), "aten.flip mixes tokens"),
    "scores": (lambda x: (x @ x.transpose(1, 2)).softmax(-1) @ x, "mixes tokens"),
    "across the batch in one dim": (
        lambda x: x.reshape(-1, HIDDEN).softmax(0).view(x.shape),
        "aten.softmax mixes",
    ),
    "its own positions": (lambda x: x + torch.arange(x.shape[1])[:, None], "numbers the tokens of each call from zero"),
    "the number of tokens": (lambda x: x / x.shape[1], "depend on the number of tokens"),
}


@pytest.mark.parametrize("name", INDEPENDENT)
def test_independent_tokens_pass(name: str) -> None:
    assert checked(INDEPENDENT[name]) > 0


@pytest.mark.parametrize("name", DEPENDENT)
def test_ops_that_mix_tokens_are_refused_by_name(name: str) -> None:
    mix, reason = DEPENDENT[name]
    with pytest.raises(llmc.LlmcError, match=reason) as caught:
        checked(mix)
    assert caught.value.code == "CACHE_IMPOSSIBLE"


def test_the_error_names_the_module() -> None:
    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.cumsum(1)

    model = Model(Layer())
    with pytest.raises(llmc.LlmcError, match=r"In mix, aten\.cumsum"):
        CheckTokenIndependence()(capture(model, first=[UnifyOpNames()], stage=Stage.OPTIMIZED))


def test_equal_calls_are_checked_once() -> None:
    assert checked(lambda x: x.sigmoid().sigmoid().sigmoid()) == checked(lambda x: x.sigmoid())
