"""Rotations are found by what they do, in every spelling; what only looks like one is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from check_pass import SIZES, VOCAB, capture, check_pass, inputs
from torch import Tensor, nn
from zoo.tiny import tiny_model

from llmc.compiler.frontend.capture import trace
from llmc.compiler.ir.program import Program
from llmc.kernels.ops import rope
from llmc.passes.base import PassResult
from llmc.passes.match import is_op
from llmc.passes.match_rope import MatchRope
from llmc.passes.precompute_positions import PrecomputePositions
from llmc.passes.remove_no_ops import RemoveNoOps

HEADS, WIDTH = 3, 8
HALF = WIDTH // 2
MAX = 32
Rotate = Callable[["Model", Tensor, Tensor], Tensor]


class Model(nn.Module):
    """`rotate(model, x, positions)` on x [B, H, S, D] between an embedding and a head."""

    def __init__(self, rotate: Rotate, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, HEADS * WIDTH)
        self.head = nn.Linear(HEADS * WIDTH, VOCAB)
        self.frequencies = nn.Buffer(10.0 ** -torch.arange(0, 1, 1 / HALF))
        self.local = nn.Buffer(3.0 ** -torch.arange(0, 1, 1 / HALF))
        self.scale = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.rotate, self.dtype = rotate, dtype

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.embed(tokens).to(self.dtype).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
        # As in a model, no linear step leads from here to another value of x's shape.
        return self.head(self.rotate(self, x, positions).tanh().transpose(1, 2).flatten(2).float())


def angles(frequencies: Tensor, positions: Tensor) -> Tensor:
    """As transformers computes them: a batched product [B, S, D/2]."""
    wide = frequencies[None, :, None].float().expand(positions.shape[0], -1, 1)
    return (wide @ positions[:, None, :].float()).transpose(1, 2)


def tables(frequencies: Tensor, positions: Tensor, scaling: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin [B, S, D], each angle twice."""
    both = torch.cat([angles(frequencies, positions)] * 2, -1)
    return both.cos() * scaling, both.sin() * scaling


def rotate_half(x: Tensor) -> Tensor:
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)


def rotate_every_two(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + rotate_half(x) * sin


# Spellings ----------------------------------------------------------------------------------------------------------


# transformers' own wording, in llama and most others.
def llama(m: Model, x: Tensor, p: Tensor) -> Tensor:
    cos, sin = (t.to(x.dtype).unsqueeze(1) for t in tables(m.frequencies, p))
    return halves(x, cos, sin)


def yarn(m: Model, x: Tensor, p: Tensor) -> Tensor:
    cos, sin = (t.unsqueeze(1) for t in tables(m.frequencies, p, 1.27))
    return halves(x, cos, sin)


def commuted(m: Model, x: Tensor, p: Tensor) -> Tensor:
    cos, sin = (t[:, None] for t in tables(m.frequencies, p))
    return sin * rotate_half(x) + cos * x


def negative_sin(m: Model, x: Tensor, p: Tensor) -> Tensor:
    """The sign stands in the table."""
    angle = angles(m.frequencies, p)[:, None]
    sin = torch.cat([-angle.sin(), angle.sin()], -1)
    return x * torch.cat([angle.cos()] * 2, -1) + x.roll(HALF, -1) * sin


def backwards(m: Model, x: Tensor, p: Tensor) -> Tensor:
    """By the negative angle."""
    cos, sin = (t[:, None] for t in tables(m.frequencies, p))
    return x * cos - rotate_half(x) * sin


def two_halves(m: Model, x: Tensor, p: Tensor) -> Tensor:
    """gpt_oss: each half on its own."""
    cos, sin = angles(m.frequencies, p)[:, None].cos(), angles(m.frequencies, p)[:, None].sin()
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def partial(m: Model, x: Tensor, p: Tensor) -> Tensor:
    """gpt_neox, phi, stablelm: the first dims only."""
    cos, sin = (t[:, None] for t in tables(m.frequencies[:2], p))
    turning, passing = x[..., :4], x[..., 4:]
    return torch.cat((halves(turning, cos, sin), passing), -1)


def zero_frequencies(m: Model, x: Tensor, p: Tensor) -> Tensor:
    """Some pairs stand still at every position."""
    cos, sin = (t[:, None] for t in tables(torch.cat([m.frequencies[:2], torch.zeros(2)]), p))
    return halves(x, cos, sin)


def rows_first(m: Model, x: Tensor, p: Tensor) -> Tensor:
    """[B, S, H, D], as in ernie or nanochat."""
    cos, sin = (t.unsqueeze(2) for t in tables(m.frequencies, p))
    return halves(x.transpose(1, 2).contiguous(), cos, sin).transpose(1, 2)


def one_head(m: Model, x: Tensor, p: Tensor) -> Tensor:
    """[B, S, D], as the shared key of deepseek is before its head."""
    cos, sin = tables(m.frequencies, p)
    return halves(x[:, 0], cos, sin).unsqueeze(1).expand(-1, HEADS, -1, -1)


def neighbours(m: Model, x: Tensor, p: Tensor) -> Tensor:
    """glm, cohere, gptj."""
    cos, sin = (
        t.repeat_interleave(2, -1)[:, None] for t in (angles(m.frequencies, p).cos(), angles(m.frequencies, p).sin())
    )
    return x * cos + rotate_every_two(x) * sin


def cohere(m: Model, x: Tensor, p: Tensor) -> Tensor:
    wide = x.float()
    cos, sin = (
        t.repeat_interleave(2, -1)[:, None] for t in (angles(m.frequencies, p).cos(), angles(m.frequencies, p).sin())
    )
    return (wide * cos + rotate_every_two(wide) * sin).to(dtype=x.dtype)


def partial_neighbours(m: Model, x: Tensor, p: Tensor) -> Tensor:
    """glm: half of the dims, in pairs of neighbours."""
    angle = angles(m.frequencies[:2], p)[:, None].repeat_interleave(2, -1)
    turning, passing = x[..., :4], x[..., 4:]
    return torch.cat([turning * angle.cos() + rotate_every_two(turning) * angle.sin(), passing], -1)


def complex_numbers(m: Model, x: Tensor, p: Tensor) -> Tensor:
    """llama4, deepseek_v2."""
    turn = torch.polar(torch.ones_like(angles(m.frequencies, p)), angles(m.frequencies, p)).unsqueeze(1)
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn).flatten(3).type_as(x)


def deinterleaved(m: Model, x: Tensor, p: Tensor) -> Tensor:
    """deepseek_v3 of old: what is laid out anew is turned in halves."""
    cos, sin = (t[:, None] for t in tables(m.frequencies, p))
    b, h, s, d = x.shape
    return halves(x.view(b, h, s, d // 2, 2).transpose(4, 3).reshape(b, h, s, d), cos, sin)


def deepseek(m: Model, x: Tensor, p: Tensor) -> Tensor:
    """Pairs of neighbours come out as halves."""
    cos, sin = (t[..., :HALF].unsqueeze(1) for t in tables(m.frequencies, p))
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def interleaved_again(m: Model, x: Tensor, p: Tensor) -> Tensor:
    """Halves come out as neighbours."""
    cos, sin = (t[:, None] for t in tables(m.frequencies, p))
    return halves(x, cos, sin).unflatten(-1, (2, HALF)).transpose(-1, -2).flatten(-2)


# Name: the rotation; (interleaved, dims that turn).
SPELLINGS: dict[str, tuple[Rotate, bool, int]] = {
    "llama": (llama, False, 8),
    "yarn": (yarn, False, 8),
    "commuted": (commuted, False, 8),
    "negative sin": (negative_sin, False, 8),
    "backwards": (backwards, False, 8),
    "two halves": (two_halves, False, 8),
    "partial": (partial, False, 4),
    "zero frequencies": (zero_frequencies, False, 8),
    "rows first": (rows_first, False, 8),
    "one head": (one_head, False, 8),
    "neighbours": (neighbours, True, 8),
    "cohere": (cohere, True, 8),
    "partial neighbours": (partial_neighbours, True, 4),
    "complex numbers": (complex_numbers, True, 8),
    "deinterleaved": (deinterleaved, False, 8),
    "deepseek": (deepseek, True, 8),
    "interleaved again": (interleaved_again, False, 8),
}


def the_rope(program: Program) -> dict[str, Any]:
    (node,) = [n for n in program.nodes if is_op(n, rope)]
    return rope.bind(node.args, node.kwargs)


def at_random_positions(program: Program, module: nn.Module, atol: float) -> None:
    generator = torch.Generator().manual_seed(1)
    for size in SIZES:
        tokens, _ = inputs(*size)
        positions = torch.randint(0, MAX, size, generator=generator)
        with torch.no_grad():
            torch.testing.assert_close(program(tokens, positions), module(tokens, positions), atol=atol, rtol=0)


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_spelling_is_the_op(name: str) -> None:
    rotate, interleaved, turning = SPELLINGS[name]
    module = Model(rotate)
    program = check_pass(
        MatchRope(),
        module,
        first=[PrecomputePositions()],
        matches=1,
        gone={"aten.mul", "aten.neg", "aten.cat", "aten.stack", "aten.view_as_complex", "llmc.embedding"},
        there={"llmc.rope"},
    )
    found = the_rope(program)
    assert found["interleaved"] is interleaved
    assert found["positions"] is program.inputs[1]
    assert [program.weight_of(found[t]).shape for t in ("cos", "sin")] == [(MAX, turning // 2)] * 2
    assert not [name for name in program.weights if name.startswith("tables.")]
    at_random_positions(program, module, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "partial", "cohere", "complex numbers"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_hides_no_rotation(name: str, dtype: torch.dtype) -> None:
    def rotate(m: Model, x: Tensor, p: Tensor) -> Tensor:
        return SPELLINGS[name][0](m, x, p).to(dtype)

    module = Model(rotate, dtype)
    program = check_pass(
        MatchRope(),
        module,
        first=[RemoveNoOps(), PrecomputePositions()],
        matches=1,
        gone={"aten.mul"},
        there={"llmc.rope"},
        atol=0.05 if dtype == torch.bfloat16 else 0.005,
    )
    assert the_rope(program)["x"].meta["val"].dtype == dtype
    # The tables are not rounded: the op computes wide.
    cos, sin = (program.weight_of(the_rope(program)[t]).evaluate() for t in ("cos", "sin"))
    torch.testing.assert_close(cos.square() + sin.square(), torch.ones_like(cos))


def test_queries_and_keys_share_their_tables() -> None:
    def both(m: Model, x: Tensor, p: Tensor) -> Tensor:
        cos, sin = (t.unsqueeze(1) for t in tables(m.frequencies, p))
        return halves(x, cos, sin) * halves(x + 1, cos, sin)

    program = check_pass(MatchRope(), Model(both), first=[PrecomputePositions()], matches=2, there={"aten.mul"})
    assert sorted(name for name in program.weights if "rope" in name) == ["rope.cos", "rope.sin"]


def test_local_and_global_tables_stay_apart() -> None:
    """gemma3, modernbert: two kinds of layers, one after the other."""

    def one_then_other(m: Model, x: Tensor, p: Tensor) -> Tensor:
        for frequencies in (m.frequencies, m.local):
            cos, sin = (t.unsqueeze(1) for t in tables(frequencies, p))
            x = torch.relu(halves(x, cos, sin))
        return x

    module = Model(one_then_other)
    program = check_pass(MatchRope(), module, first=[PrecomputePositions()], matches=2, gone={"aten.mul"})
    assert len([name for name in program.weights if "rope" in name]) == 4
    at_random_positions(program, module, atol=1e-5)


def test_one_rotation_behind_another_is_two() -> None:
    """Each of them turns pairs; so do both together, but by angles that are in no table."""

    def twice(m: Model, x: Tensor, p: Tensor) -> Tensor:
        for frequencies in (m.frequencies, m.local):
            cos, sin = (t.unsqueeze(1) for t in tables(frequencies, p))
            x = halves(x, cos, sin)
        return x

    check_pass(MatchRope(), Model(twice), first=[PrecomputePositions()], matches=2, gone={"aten.mul"})


def test_a_rotated_value_may_have_other_readers() -> None:
    def rotate(m: Model, x: Tensor, p: Tensor) -> Tensor:
        turned = llama(m, x, p)
        return turned * x.sigmoid() + turned.flip(2)

    check_pass(MatchRope(), Model(rotate), first=[PrecomputePositions()], matches=1, there={"aten.mul", "aten.flip"})


# Model types whose rotations differ in kind, and how many a tiny one has: one for q and one for k a layer.
@pytest.mark.parametrize(("model_type", "turns"), [("gpt_neox", 4), ("glm", 4), ("gptj", 4)])
def test_a_model_of_transformers(model_type: str, turns: int) -> None:
    program = trace(tiny_model(model_type), {}, model_type, MAX)
    want = program(*inputs(2, 9))
    PrecomputePositions()(program)
    assert MatchRope()(program) == PassResult(turns, [])
    assert program.ops()["llmc.rope"] == turns
    torch.testing.assert_close(program(*inputs(2, 9)), want, atol=1e-5, rtol=0)


# Left alone -----------------------------------------------------------------------------------------------------------


def other_positions(m: Model, x: Tensor, p: Tensor) -> Tensor:
    cos, sin = (t.unsqueeze(1) for t in tables(m.frequencies, p.flip(1)))
    return halves(x, cos, sin)


def trained(m: Model, x: Tensor, p: Tensor) -> Tensor:
    cos, sin = (t.unsqueeze(1) for t in tables(m.scale[:HALF], p))
    return halves(x, cos, sin)


def by_data(m: Model, x: Tensor, p: Tensor) -> Tensor:
    angle = torch.cat([angles(m.frequencies, p)[:, None] * x[..., :1].sigmoid()] * 2, -1)
    return halves(x, angle.cos(), angle.sin())


def with_tables(change: Callable[[Tensor, Tensor, Tensor, Model], Tensor]) -> Rotate:
    def rotate(m: Model, x: Tensor, p: Tensor) -> Tensor:
        cos, sin = (t.unsqueeze(1) for t in tables(m.frequencies, p))
        return change(x, cos, sin, m)

    return rotate


NOT_ROTATED = "not rotated in pairs"
LEFT: dict[str, tuple[Rotate, str | None]] = {
    "1. cos only": (with_tables(lambda x, c, s, m: x * c), NOT_ROTATED),
    "1. a sum": (with_tables(lambda x, c, s, m: x + c), None),
    "1. no sign": (with_tables(lambda x, c, s, m: x * c + rotate_half(x).abs() * s), NOT_ROTATED),
    "1. a mirror": (with_tables(lambda x, c, s, m: x * c + x.roll(HALF, -1) * s), NOT_ROTATED),
    "1. pairs of other dims": (with_tables(lambda x, c, s, m: x * c + rotate_half(x.flip(-1)) * s), NOT_ROTATED),
    "1. the heads change places": (with_tables(lambda x, c, s, m: x * c + rotate_half(x.flip(1)) * s), NOT_ROTATED),
    "1. the rows change places": (with_tables(lambda x, c, s, m: x * c + rotate_half(x.roll(1, 2)) * s), NOT_ROTATED),
    "2. a table that a weight scales": (with_tables(lambda x, c, s, m: halves(x, c * m.scale, s)), None),
    "2. tables of other positions": (other_positions, None),
    "2. angles that are trained": (trained, None),
    "2. angles that follow from the data": (by_data, None),
    "3. a product of two values": (with_tables(lambda x, c, s, m: x * x * c), NOT_ROTATED),
    "3. one of them in the sine": (with_tables(lambda x, c, s, m: x * c + rotate_half(x) * (s * x)), NOT_ROTATED),
    "3. scaled by a weight on the way": (
        with_tables(lambda x, c, s, m: x * c + rotate_half(x * m.scale) * s),
        NOT_ROTATED,
    ),
    "4. two values": (with_tables(lambda x, c, s, m: x * c + rotate_half(x.sin()) * s), NOT_ROTATED),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_no_rotation_is_left_alone(name: str) -> None:
    rotate, reason = LEFT[name]
    check_pass(MatchRope(), Model(rotate), first=[PrecomputePositions()], matches=0, gone={"llmc.rope"}, miss=reason)


BEHIND: dict[str, tuple[Rotate, str]] = {
    "times a number": (lambda m, x, p: llama(m, x, p) * 1.7, "aten.mul"),
    "times a weight": (lambda m, x, p: llama(m, x, p) * m.scale, "aten.mul"),
    "plus a table": (lambda m, x, p: llama(m, x, p) + tables(m.local, p)[1].unsqueeze(1), "aten.add"),
}


@pytest.mark.parametrize("name", BEHIND)
def test_what_is_done_behind_a_rotation_is_still_done(name: str) -> None:
    rotate, op = BEHIND[name]
    program = check_pass(MatchRope(), Model(rotate), first=[PrecomputePositions()], matches=1, there={op})
    assert program.ops()[op] == 1


def test_a_cast_between_is_no_part_of_a_rotation() -> None:
    """The op gives what it is given: x stays the wide value that it was."""

    def rotate(m: Model, x: Tensor, p: Tensor) -> Tensor:
        return llama(m, x.sin(), p).to(torch.bfloat16)

    program = check_pass(
        MatchRope(), Model(rotate), first=[PrecomputePositions()], matches=1, there={"aten.to"}, atol=0.01
    )
    assert the_rope(program)["x"].meta["val"].dtype == torch.float32


def test_without_tables_nothing_is_probed() -> None:
    program = capture(Model(lambda m, x, p: x * 2))
    assert MatchRope()(program).misses == []
