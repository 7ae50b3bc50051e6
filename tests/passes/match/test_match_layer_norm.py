"""Every spelling of a layer norm becomes one op; similar formulas stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from check_pass import VOCAB, capture, check_pass
from torch import Tensor, nn
from torch.nn import functional as F

from llmc.ir.program import Program
from llmc.passes.match.fold_constants import FoldConstants
from llmc.passes.match.match_layer_norm import MatchLayerNorm
from llmc.passes.queries import dtype

WIDTH, HEADS, EPS = 12, 3, 1e-3
Norm = Callable[[Tensor, Tensor, Tensor], Tensor]


class Normed(nn.Module):
    """`norm(x, weight, bias)` of hidden states [B, S, 12]."""

    def __init__(self, norm: Norm, *shape: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.weight = nn.Parameter(torch.randn(*(shape or (WIDTH,))))
        self.bias = nn.Parameter(torch.randn(*(shape or (WIDTH,))))
        self.head = nn.Linear(WIDTH, VOCAB)
        self.norm = norm

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(tokens), self.weight, self.bias).float().flatten(2))


def heads(x: Tensor) -> Tensor:
    return x.view(x.shape[0], x.shape[1], HEADS, WIDTH // HEADS)


def centre(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def cohere(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    original_dtype = x.dtype
    x = x.to(torch.float32)
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).pow(2).mean(-1, keepdim=True)
    x = (x - mean) * torch.rsqrt(variance + EPS)
    return (w.to(torch.float32) * x).to(original_dtype)


def deberta(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    original_dtype = x.dtype
    x = x.float()
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).pow(2).mean(-1, keepdim=True)
    x = (x - mean) / torch.sqrt(variance + EPS)
    return w * x.to(original_dtype) + b


def xlstm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return centre(x) * torch.rsqrt(x.var(dim=-1, keepdim=True, unbiased=False) + EPS) * w + b


def by_var_mean(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    return b + w * ((x - mean) * torch.rsqrt(variance + EPS))


def native(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.native_layer_norm(x, (WIDTH,), w, b, EPS)[0]


# Name: (norm, whether the op has the weight, whether it has the bias).
SPELLINGS: dict[str, tuple[Norm, bool, bool]] = {
    "aten": (lambda x, w, b: F.layer_norm(x, (WIDTH,), w, b, EPS), True, True),
    "aten without bias": (lambda x, w, b: F.layer_norm(x, (WIDTH,), w, None, EPS), True, False),
    "aten bare": (lambda x, w, b: F.layer_norm(x, (WIDTH,)), False, False),
    "aten native": (native, True, True),
    "cohere": (cohere, True, False),
    "deberta": (deberta, True, True),
    "xlstm": (xlstm, True, True),
    "var_mean": (by_var_mean, True, True),
    "var of the centred": (lambda x, w, b: (c := centre(x)) * (c.var(-1, False, True) + EPS) ** -0.5 + b, False, True),
    "per head": (lambda x, w, b: (c := centre(heads(x))) * torch.rsqrt((c * c).mean(-1, True) + EPS), False, False),
    "nemotron": (lambda x, w, b: F.layer_norm(x, (WIDTH,), w + 1, b, EPS), True, True),
}


def norm_arguments(program: Program) -> dict[str, Any]:
    (node,) = [n for n in program.nodes if "layer_norm" in str(n.target)]
    return dict(zip(("x", "weight", "bias", "eps"), node.args, strict=True))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_spelling_becomes_the_op(spelling: str) -> None:
    norm, weighted, shifted = SPELLINGS[spelling]
    gone = {"aten.rsqrt", "aten.sqrt", "aten.mean", "aten.var", "aten.mul", "aten.layer_norm", "aten.native_layer_norm"}
    program = check_pass(MatchLayerNorm(), Normed(norm), matches=1, gone=gone, there={"llmc.layer_norm"})
    values = norm_arguments(program)
    assert ((values["weight"] is not None), (values["bias"] is not None)) == (weighted, shifted)


@pytest.mark.parametrize("spelling", ["cohere", "deberta", "xlstm", "nemotron"])
def test_matches_after_constants_are_folded(spelling: str) -> None:
    program = check_pass(MatchLayerNorm(), Normed(SPELLINGS[spelling][0]), matches=1, first=[FoldConstants()])
    assert program.weight_of(norm_arguments(program)["weight"]) is not None


# The op rounds once and the models round twice, hence the tolerance.
@pytest.mark.parametrize("spelling", ["aten", "cohere", "deberta"])
def test_casts_around_a_half_precision_norm_are_removed(spelling: str) -> None:
    def half(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return SPELLINGS[spelling][0](*(t.to(torch.bfloat16) for t in (x, w, b)))

    program = check_pass(MatchLayerNorm(), Normed(half), matches=1, gone={"aten.mul"}, atol=0.04)
    assert dtype(norm_arguments(program)["x"]) == torch.bfloat16


def test_a_weight_per_head_stays_after_the_norm() -> None:
    def norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return SPELLINGS["per head"][0](x, w, b) * w + b

    module = Normed(norm, HEADS, WIDTH // HEADS)
    program = check_pass(MatchLayerNorm(), module, matches=1, there={"aten.mul", "aten.add"})
    assert norm_arguments(program)["weight"] is norm_arguments(program)["bias"] is None


def test_a_bias_with_a_factor_stays_after_the_norm() -> None:
    def norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return torch.add(cohere(x, w, b), b, alpha=2)

    program = check_pass(MatchLayerNorm(), Normed(norm), matches=1, there={"aten.add"})
    assert norm_arguments(program)["bias"] is None


def test_statistics_with_users_stay() -> None:
    def norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        y, mean, _ = torch.native_layer_norm(x, (WIDTH,), w, b, EPS)
        return y + mean

    check_pass(MatchLayerNorm(), Normed(norm), matches=1, there={"llmc.layer_norm", "aten.native_layer_norm"})


def mean_of_another_value(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return (x - (x * w).mean(-1, True)) * torch.rsqrt(centre(x).pow(2).mean(-1, True) + EPS)


LEFT: dict[str, tuple[Norm, str]] = {
    "1. several dims, called": (lambda x, w, b: F.layer_norm(heads(x), (HEADS, WIDTH // HEADS)), "several dims"),
    "1. another dim": (lambda x, w, b: (c := x - x.mean(1, True)) * (c.pow(2).mean(1, True) + EPS).rsqrt(), "last dim"),
    "1. variance of another dim": (lambda x, w, b: centre(x) * (x.var(1, False, True) + EPS).rsqrt(), "last dim"),
    "1. squares of another dim": (lambda x, w, b: (c := centre(x)) / (c.pow(2).mean(1, True) + EPS).sqrt(), "last dim"),
    "2. unbiased": (lambda x, w, b: centre(x) * (x.var(-1, keepdim=True) + EPS).rsqrt(), "unbiased"),
    "2. unbiased by var_mean": (
        lambda x, w, b: centre(x) / (torch.var_mean(x, -1, keepdim=True)[0] + EPS).sqrt(),
        "unb",
    ),
    "3. eps beside the root": (lambda x, w, b: centre(x) / (x.var(-1, False, True).sqrt() + EPS), "added to the root"),
    "3. eps a weight": (lambda x, w, b: (c := centre(x)) / (c.pow(2).mean(-1, True) + w.abs()).sqrt(), "not a number"),
    "4. another variance": (
        lambda x, w, b: centre(x) * ((x * w).var(-1, False, True) + EPS).rsqrt(),
        "different values",
    ),
    "4. another mean": (mean_of_another_value, ""),
    "5. a wider result": (lambda x, w, b: (centre(x) * (x.var(-1, False, True).double() + EPS).rsqrt()) * 2, "float64"),
    "not centred": (lambda x, w, b: x * (x.var(-1, False, True) + EPS).rsqrt(), ""),
    "another root": (lambda x, w, b: centre(x) * (x.var(-1, False, True) + EPS).sqrt(), ""),
}


@pytest.mark.parametrize("case", LEFT)
def test_left_alone(case: str) -> None:
    norm, reason = LEFT[case]
    check_pass(MatchLayerNorm(), Normed(norm), matches=0, miss=reason or None, gone={"llmc.layer_norm"})


def test_an_rms_norm_is_no_miss() -> None:
    module = Normed(lambda x, w, b: x / (x.square().mean(-1, True).sqrt() + EPS))
    assert not MatchLayerNorm()(capture(module)).misses
