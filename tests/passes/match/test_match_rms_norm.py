"""Every spelling of an RMS norm becomes one op; similar formulas stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from check_pass import VOCAB, check_pass
from torch import Tensor, nn
from torch.nn import functional as F

from llmc.ir.program import Program
from llmc.passes.match.fold_constants import FoldConstants
from llmc.passes.match.match_layer_norm import MatchLayerNorm
from llmc.passes.match.match_rms_norm import MatchRmsNorm
from llmc.passes.match.remove_no_ops import RemoveNoOps
from llmc.passes.queries import behind_widening, dtype, shape

WIDTH, HEADS, EPS = 12, 3, 1e-3
Norm = Callable[[Tensor, Tensor], Tensor]


class Normed(nn.Module):
    """`norm(x, weight)` of hidden states [B, S, 12] between embedding and LM head."""

    def __init__(self, norm: Norm, *shape: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.weight = nn.Parameter(torch.randn(*(shape or (WIDTH,))))
        self.head = nn.Linear(WIDTH, VOCAB)
        self.norm = norm

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(tokens), self.weight).float().flatten(2))


def heads(x: Tensor) -> Tensor:
    return x.view(x.shape[0], x.shape[1], HEADS, WIDTH // HEADS)


def bare(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def llama(x: Tensor, w: Tensor) -> Tensor:
    original_dtype = x.dtype
    x = x.to(torch.float32)
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)).to(original_dtype)


def t5(x: Tensor, w: Tensor) -> Tensor:
    return w * (x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + EPS))


def gemma(x: Tensor, w: Tensor) -> Tensor:
    return (bare(x.float()) * (1.0 + w.float())).type_as(x)


def gemma3n(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.pow(wide.pow(2).mean(-1, keepdim=True) + EPS, -0.5) * w.float()).type_as(x)


def half_scale(x: Tensor, w: Tensor) -> Tensor:
    """deepseek_v4: the scale is cast, not the product."""
    return x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS).to(x.dtype)


# Name: (norm, whether the op has the weight).
SPELLINGS: dict[str, tuple[Norm, bool]] = {
    "llama": (llama, True),
    "t5": (t5, True),
    "olmo2": (lambda x, w: (w * bare(x.float())).to(x.dtype), True),
    "gemma": (gemma, True),
    "gemma3n": (gemma3n, True),
    "deepseek_v4": (half_scale, False),
    "no weight": (lambda x, w: bare(x.float()).type_as(x), False),
    "mul for square": (lambda x, w: w * (torch.rsqrt((x * x).mean(2, keepdim=True) + EPS) * x), True),
    "div by sqrt": (lambda x, w: x / torch.sqrt(EPS + x.square().mean(-1, True)) * w, True),
    "div by pow": (lambda x, w: x / (x.square().mean(-1, True) + EPS) ** 0.5 * w, True),
    "reciprocal": (lambda x, w: x * torch.sqrt(x.square().mean(-1, True) + EPS).reciprocal() * w, True),
    "no eps": (lambda x, w: x * torch.rsqrt(x.square().mean(-1, True)) * w, True),
    "sum over width": (lambda x, w: x * torch.rsqrt(x.square().sum(-1, True) / WIDTH + EPS) * w, True),
    "sum by width": (lambda x, w: x * torch.rsqrt((1 / WIDTH) * x.square().sum(-1, True) + EPS) * w, True),
    "vector norm": (lambda x, w: x / (x.norm(2, dim=-1, keepdim=True) * WIDTH**-0.5) * w, True),
    "F.rms_norm": (lambda x, w: F.rms_norm(x, (WIDTH,), w, EPS), True),
    "F.rms_norm bare": (lambda x, w: F.rms_norm(x, (WIDTH,)), False),
    "clamped": (lambda x, w: llama(x.clamp(-1, 1), w), True),
    "per head": (lambda x, w: bare(heads(x)), False),
}


def norm_arguments(program: Program) -> dict[str, Any]:
    (node,) = [n for n in program.nodes if "rms_norm" in str(n.target)]
    return dict(zip(("x", "weight", "eps"), node.args, strict=True))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_spelling_becomes_the_op(spelling: str) -> None:
    norm, weighted = SPELLINGS[spelling]
    gone = {"aten.rsqrt", "aten.sqrt", "aten.pow", "aten.mean", "aten.sum", "aten.mul", "aten.div", "aten.rms_norm"}
    program = check_pass(MatchRmsNorm(), Normed(norm), matches=1, gone=gone, there={"llmc.rms_norm"})
    assert (norm_arguments(program)["weight"] is not None) == weighted


def one_over(x: Tensor, w: Tensor) -> Tensor:
    """A norm that is captured as a reciprocal times 1."""
    return x * (1 / torch.sqrt(x.square().mean(-1, True) + EPS)) * w


@pytest.mark.parametrize("norm", [llama, t5, gemma, gemma3n, one_over])
def test_matches_after_no_ops_and_constants_are_folded(norm: Norm) -> None:
    first = [RemoveNoOps(), FoldConstants()]
    program = check_pass(MatchRmsNorm(), Normed(norm), matches=1, gone={"aten.mul"}, first=first)
    assert program.weight_of(norm_arguments(program)["weight"]) is not None


# The op rounds once and the models round twice, hence the tolerance.
@pytest.mark.parametrize(
    "spelling", ["llama", "olmo2", "gemma", "gemma3n", "deepseek_v4", "no weight", "F.rms_norm bare"]
)
def test_casts_around_a_half_precision_norm_are_removed(spelling: str) -> None:
    def half(x: Tensor, w: Tensor) -> Tensor:
        return SPELLINGS[spelling][0](x.to(torch.bfloat16), w.to(torch.bfloat16))

    program = check_pass(MatchRmsNorm(), Normed(half), matches=1, gone={"aten.mul"}, atol=0.04)
    assert dtype(norm_arguments(program)["x"]) == torch.bfloat16


def test_a_float32_result_of_a_half_precision_norm_needs_a_float32_input() -> None:
    program = check_pass(MatchRmsNorm(), Normed(lambda x, w: t5(x.to(torch.bfloat16), w)), matches=1, gone={"aten.mul"})
    assert dtype(norm_arguments(program)["x"]) == torch.float32


def test_a_cast_that_rounds_the_input_stays() -> None:
    def norm(x: Tensor, w: Tensor) -> Tensor:
        return llama(x.to(torch.bfloat16).to(torch.float32), w)

    program = check_pass(MatchRmsNorm(), Normed(norm), matches=1)
    assert dtype(behind_widening(norm_arguments(program)["x"])) == torch.bfloat16


def test_the_default_eps_is_that_of_the_accumulator() -> None:
    def norm(x: Tensor, w: Tensor) -> Tensor:
        return F.rms_norm((x * 1e-3).to(torch.bfloat16), (WIDTH,))

    program = check_pass(MatchRmsNorm(), Normed(norm), matches=1, atol=0.02)
    assert norm_arguments(program)["eps"] == torch.finfo(torch.float32).eps


def test_a_weight_per_head_stays_after_the_norm() -> None:
    def norm(x: Tensor, w: Tensor) -> Tensor:
        return bare(heads(x)) * w

    program = check_pass(MatchRmsNorm(), Normed(norm, HEADS, WIDTH // HEADS), matches=1, there={"aten.mul"})
    assert norm_arguments(program)["weight"] is None


def test_a_weight_with_leading_dims_of_size_one_is_reshaped() -> None:
    def norm(x: Tensor, w: Tensor) -> Tensor:
        return bare(x) * w

    program = check_pass(MatchRmsNorm(), Normed(norm, 1, 1, WIDTH), matches=1, gone={"aten.mul"})
    assert shape(norm_arguments(program)["weight"]) == (WIDTH,)


def test_the_weight_stays_outside_if_the_normed_value_has_other_users() -> None:
    def norm(x: Tensor, w: Tensor) -> Tensor:
        y = bare(x)
        return y * w + y

    program = check_pass(MatchRmsNorm(), Normed(norm), matches=1, there={"aten.mul"})
    assert norm_arguments(program)["weight"] is None


def test_gate_and_weight_of_a_grouped_norm_stay_outside() -> None:
    def mamba(x: Tensor, w: Tensor) -> Tensor:
        return w * bare(heads(x * F.silu(x))).view(x.shape)

    check_pass(MatchRmsNorm(), Normed(mamba), matches=1, gone={"aten.rsqrt"}, there={"aten.mul", "aten.silu"})


def test_a_factor_computed_from_the_input_is_no_weight() -> None:
    def norm(x: Tensor, w: Tensor) -> Tensor:
        return bare(x) * x.mean((0, 1))

    program = check_pass(MatchRmsNorm(), Normed(norm), matches=1, there={"aten.mul"})
    assert norm_arguments(program)["weight"] is None


LEFT: dict[str, tuple[Norm, str]] = {
    "1. eps beside the root": (lambda x, w: x / (x.square().mean(-1, True).sqrt() + EPS), "added to the root"),
    "1. eps beside the vector norm": (lambda x, w: x / (x.norm(2, dim=-1, keepdim=True) * WIDTH**-0.5 + EPS), ""),
    "1. eps a weight": (lambda x, w: x * torch.rsqrt(x.square().mean(-1, True) + w.abs()), "eps is not a number"),
    "2. a sum": (lambda x, w: x * torch.rsqrt((x * x).sum(-1, True) + EPS), "no mean"),
    "2. a sum over another number": (lambda x, w: x * torch.rsqrt((x * x).sum(-1, True) / 3 + EPS), "no mean"),
    "2. a length": (lambda x, w: x / x.norm(2, dim=-1, keepdim=True), ""),
    "2. a length by another number": (lambda x, w: x / (x.norm(2, dim=-1, keepdim=True) * 0.5), ""),
    "2. a length of ord 1": (lambda x, w: x / (x.norm(1, dim=-1, keepdim=True) * WIDTH**-0.5), ""),
    "3. another dim": (lambda x, w: x * torch.rsqrt(x.square().mean(1, True) + EPS), "last dim alone"),
    "3. two dims": (lambda x, w: x * torch.rsqrt(x.square().mean((1, 2), True) + EPS), "last dim alone"),
    "3. several dims": (lambda x, w: F.rms_norm(heads(x), (HEADS, WIDTH // HEADS)), "several dims"),
    "4. another value": (lambda x, w: (x + 1) * torch.rsqrt(x.square().mean(-1, True) + EPS), "not the squared value"),
    "5. a wider result": (lambda x, w: (x * torch.rsqrt(x.square().mean(-1, True) + EPS).double()) * 2, "float64"),
    "a cube": (lambda x, w: x * torch.rsqrt(x.abs().pow(3).mean(-1, True) + EPS), ""),
    "a product that is no square": (lambda x, w: x * torch.rsqrt((x * (x * w.abs())).mean(-1, True) + EPS), ""),
    "the root itself": (lambda x, w: x * torch.sqrt(x.square().mean(-1, True) + EPS), ""),
    "a third root": (lambda x, w: x * torch.pow(x.square().mean(-1, True) + EPS, -1 / 3), ""),
    "a division of the root": (lambda x, w: torch.sqrt(x.square().mean(-1, True) + EPS) / (x.square() + 1), ""),
}


@pytest.mark.parametrize("case", LEFT)
def test_left_alone(case: str) -> None:
    norm, reason = LEFT[case]
    check_pass(MatchRmsNorm(), Normed(norm), matches=0, miss=reason or None, gone={"llmc.rms_norm"})


def test_a_layer_norm_is_matched_first() -> None:
    def norm(x: Tensor, w: Tensor) -> Tensor:
        return bare(x - x.mean(-1, keepdim=True)) * w

    check_pass(MatchRmsNorm(), Normed(norm), matches=0, first=[MatchLayerNorm()], there={"llmc.layer_norm"})
    assert MatchLayerNorm in MatchRmsNorm.after
