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
    """Logits of what `mix` makes of the embedded tokens [B, S, 8]."""

    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB)
        self.mix = mix

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return linear(self.mix(embedding(input_ids, self.table.weight)), self.head.weight)


def checked(mix: Callable[[Tensor], Tensor]) -> int:
    return CheckTokenIndependence()(capture(Model(mix), first=[UnifyOpNames()], stage=Stage.OPTIMIZED)).matches


APART: dict[str, Callable[[Tensor], Tensor]] = {
    "elementwise": lambda x: torch.sigmoid(x) * 3 + x,
    "heads and back": lambda x: x.view(*x.shape[:2], 2, 4).transpose(1, 2).transpose(1, 2).reshape(x.shape),
    "softmax inside a token": lambda x: x.softmax(-1),
    "sort inside a token": lambda x: x.sort(-1).values,
    "all tokens in one dim": lambda x: x.reshape(-1, HIDDEN).relu().view(x.shape),
    "four of each token": lambda x: x.reshape(-1, 2).softmax(-1).view(x.shape),
    "all tokens four times": lambda x: x.reshape(-1, HIDDEN).repeat(4, 1).view(4, -1, HIDDEN).sum(0).view(x.shape),
    "top-k and scatter": lambda x: torch.zeros_like(x).scatter(-1, x.topk(2, -1).indices, 1.0),
    "an index into one": lambda x: x + x[..., :1].gather(-1, (x[..., :1] > 99).long()),
    "constants of a size": lambda x: x + torch.ones(x.shape[1], HIDDEN),
}
MIXED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "running sum": (lambda x: x.cumsum(1), "aten.cumsum lets a token see others"),
    "mean over the sequence": (lambda x: x + x.mean(1, keepdim=True), "aten.mean lets a token see others"),
    "convolution": (
        lambda x: F.conv1d(F.pad(x.transpose(1, 2), (2, 0)), torch.ones(HIDDEN, 1, 3), groups=HIDDEN).transpose(1, 2),
        "can't be told apart",
    ),
    "the token before": (lambda x: x + torch.roll(x, 1, 1), "aten.roll lets a token see others"),
    "backwards": (lambda x: x.flip(1), "aten.flip lets a token see others"),
    "scores": (lambda x: (x @ x.transpose(1, 2)).softmax(-1) @ x, "lets a token see others"),
    "across the batch in one dim": (lambda x: x.reshape(-1, HIDDEN).softmax(0).view(x.shape), "aten.softmax lets a"),
    "own count": (lambda x: x + torch.arange(x.shape[1])[:, None], "counts tokens from the first of each call on"),
    "how many": (lambda x: x / x.shape[1], "gives other values where there are more tokens"),
}


@pytest.mark.parametrize("name", APART)
def test_what_treats_tokens_one_by_one_passes(name: str) -> None:
    assert checked(APART[name]) > 0


@pytest.mark.parametrize("name", MIXED)
def test_what_mixes_tokens_is_refused_by_name(name: str) -> None:
    mix, reason = MIXED[name]
    with pytest.raises(llmc.LlmcError, match=reason) as caught:
        checked(mix)
    assert caught.value.code == "CACHE_IMPOSSIBLE"


def test_a_reason_names_the_module() -> None:
    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.cumsum(1)

    model = Model(Layer())
    with pytest.raises(llmc.LlmcError, match=r"In mix, aten\.cumsum"):
        CheckTokenIndependence()(capture(model, first=[UnifyOpNames()], stage=Stage.OPTIMIZED))


def test_calls_that_are_alike_are_tried_once() -> None:
    assert checked(lambda x: x.sigmoid().sigmoid().sigmoid()) == checked(lambda x: x.sigmoid())
