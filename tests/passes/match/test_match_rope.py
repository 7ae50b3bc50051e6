"""MatchRope finds rotations in every spelling and leaves similar formulas alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from check_pass import SIZES, capture, check_pass, inputs
from rotations import HALF, MAX, SPELLINGS, Model, Rotate, angles, halves, llama, rotate_half, tables
from torch import Tensor, nn
from zoo.tiny import tiny_model

from llmc.compiler.frontend.capture import trace
from llmc.ir.program import Program
from llmc.kernels.ops import embedding, rope
from llmc.passes.base import PassResult
from llmc.passes.match.match_rope import MatchRope
from llmc.passes.match.precompute_positions import PrecomputePositions
from llmc.passes.match.remove_no_ops import RemoveNoOps
from llmc.passes.queries import is_op


def rope_arguments(program: Program) -> dict[str, Any]:
    (node,) = [n for n in program.nodes if is_op(n, rope)]
    return rope.bind(node.args, node.kwargs)


def check_at_random_positions(program: Program, module: nn.Module, atol: float) -> None:
    generator = torch.Generator().manual_seed(1)
    for size in SIZES:
        tokens, _ = inputs(*size)
        positions = torch.randint(0, MAX, size, generator=generator)
        with torch.no_grad():
            torch.testing.assert_close(program(tokens, positions), module(tokens, positions), atol=atol, rtol=0)


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_spelling_becomes_the_op(name: str) -> None:
    rotate, interleaved, rotated = SPELLINGS[name]
    module = Model(rotate)
    program = check_pass(
        MatchRope(),
        module,
        first=[PrecomputePositions()],
        matches=1,
        gone={"aten.mul", "aten.neg", "aten.cat", "aten.stack", "aten.view_as_complex", "llmc.embedding"},
        there={"llmc.rope"},
    )
    values = rope_arguments(program)
    assert values["interleaved"] is interleaved
    assert values["positions"] is program.inputs[1]
    assert [program.weight_of(values[t]).shape for t in ("cos", "sin")] == [(MAX, rotated // 2)] * 2
    assert not [name for name in program.weights if name.startswith("tables.")]
    check_at_random_positions(program, module, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", torch.float16),
        ("llama", torch.bfloat16),
        ("partial", torch.bfloat16),
        ("cohere", torch.bfloat16),
        ("complex numbers", torch.bfloat16),
    ],
)
def test_finds_a_rotation_in_half_precision(name: str, dtype: torch.dtype) -> None:
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
    assert rope_arguments(program)["x"].meta["val"].dtype == dtype
    # The tables are not rounded, because the op computes in float32.
    cos, sin = (program.weight_of(rope_arguments(program)[t]).evaluate() for t in ("cos", "sin"))
    torch.testing.assert_close(cos.square() + sin.square(), torch.ones_like(cos))


def test_queries_and_keys_share_their_tables() -> None:
    def both(m: Model, x: Tensor, p: Tensor) -> Tensor:
        cos, sin = (t.unsqueeze(1) for t in tables(m.frequencies, p))
        return halves(x, cos, sin) * halves(x + 1, cos, sin)

    program = check_pass(MatchRope(), Model(both), first=[PrecomputePositions()], matches=2, there={"aten.mul"})
    assert sorted(name for name in program.weights if "rope" in name) == ["rope.cos", "rope.sin"]


def test_local_and_global_layers_keep_their_own_tables() -> None:
    """gemma3, modernbert: layers with different frequencies alternate."""

    def one_then_other(m: Model, x: Tensor, p: Tensor) -> Tensor:
        for frequencies in (m.frequencies, m.local):
            cos, sin = (t.unsqueeze(1) for t in tables(frequencies, p))
            x = torch.relu(halves(x, cos, sin))
        return x

    module = Model(one_then_other)
    program = check_pass(MatchRope(), module, first=[PrecomputePositions()], matches=2, gone={"aten.mul"})
    assert len([name for name in program.weights if "rope" in name]) == 4
    check_at_random_positions(program, module, atol=1e-5)


def test_two_successive_rotations_become_two_ops() -> None:
    """Both together are a rotation too, but no table has the sums of their angles."""

    def twice(m: Model, x: Tensor, p: Tensor) -> Tensor:
        for frequencies in (m.frequencies, m.local):
            cos, sin = (t.unsqueeze(1) for t in tables(frequencies, p))
            x = halves(x, cos, sin)
        return x

    check_pass(MatchRope(), Model(twice), first=[PrecomputePositions()], matches=2, gone={"aten.mul"})


def test_a_rotated_value_may_have_several_users() -> None:
    def rotate(m: Model, x: Tensor, p: Tensor) -> Tensor:
        rotated = llama(m, x, p)
        return rotated * x.sigmoid() + rotated.flip(2)

    check_pass(MatchRope(), Model(rotate), first=[PrecomputePositions()], matches=1, there={"aten.mul", "aten.flip"})


def test_a_model_with_its_own_table_of_angles() -> None:
    program = trace(tiny_model("gptj"), {}, "gptj", MAX)
    want = program(*inputs(2, 9))
    PrecomputePositions()(program)
    assert MatchRope()(program) == PassResult(4, [])
    assert program.ops()["llmc.rope"] == 4
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


def looked_up_elsewhere(m: Model, x: Tensor, p: Tensor) -> Tensor:
    cos, sin = (embedding(p.flip(1), t).unsqueeze(1) for t in (m.cos, m.sin))
    return halves(x, cos, sin)


def trained_tables(m: Model, x: Tensor, p: Tensor) -> Tensor:
    cos, sin = (embedding(p, t).unsqueeze(1) for t in (m.trained_cos, m.trained_sin))
    return halves(x, cos, sin)


def beside(x: Tensor, cos: Tensor, sin: Tensor, m: Model) -> Tensor:
    """The result depends on x directly too, not only through `start`."""
    start = x.roll(1, -1)
    return start.flip(-1) * cos + rotate_half(x.sin()) * sin


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
    "1. reordered heads": (with_tables(lambda x, c, s, m: x * c + rotate_half(x.flip(1)) * s), NOT_ROTATED),
    "1. reordered positions": (with_tables(lambda x, c, s, m: x * c + rotate_half(x.roll(1, 2)) * s), NOT_ROTATED),
    "2. a table scaled by a weight": (with_tables(lambda x, c, s, m: halves(x, c * m.scale, s)), None),
    "2. tables of other positions": (other_positions, None),
    "2. lookups at other positions": (looked_up_elsewhere, None),
    "2. trained tables": (trained_tables, None),
    "2. trained angles": (trained, None),
    "2. angles that depend on tokens": (by_data, None),
    "3. a product of two values": (with_tables(lambda x, c, s, m: x * x * c), NOT_ROTATED),
    "3. a product with the sine": (with_tables(lambda x, c, s, m: x * c + rotate_half(x) * (s * x)), NOT_ROTATED),
    "3. partly scaled by a weight": (
        with_tables(lambda x, c, s, m: x * c + rotate_half(x * m.scale) * s),
        NOT_ROTATED,
    ),
    "4. a second input": (with_tables(beside), NOT_ROTATED),
    "4. two values": (with_tables(lambda x, c, s, m: x * c + rotate_half(x.sin()) * s), NOT_ROTATED),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name: str) -> None:
    rotate, reason = LEFT[name]
    check_pass(MatchRope(), Model(rotate), first=[PrecomputePositions()], matches=0, gone={"llmc.rope"}, miss=reason)


AFTER: dict[str, tuple[Rotate, str]] = {
    "times a number": (lambda m, x, p: llama(m, x, p) * 1.7, "aten.mul"),
    "times a weight": (lambda m, x, p: llama(m, x, p) * m.scale, "aten.mul"),
    "plus a table": (lambda m, x, p: llama(m, x, p) + tables(m.local, p)[1].unsqueeze(1), "aten.add"),
}


@pytest.mark.parametrize("name", AFTER)
def test_calls_after_a_rotation_stay(name: str) -> None:
    rotate, op = AFTER[name]
    program = check_pass(MatchRope(), Model(rotate), first=[PrecomputePositions()], matches=1, there={op})
    assert program.ops()[op] == 1


def test_a_cast_after_a_rotation_is_not_part_of_it() -> None:
    """The op keeps the dtype of its input, so x stays float32."""

    def rotate(m: Model, x: Tensor, p: Tensor) -> Tensor:
        return llama(m, x.sin(), p).to(torch.bfloat16)

    program = check_pass(
        MatchRope(), Model(rotate), first=[PrecomputePositions()], matches=1, there={"aten.to"}, atol=0.01
    )
    assert rope_arguments(program)["x"].meta["val"].dtype == torch.float32


def test_without_tables_nothing_is_probed() -> None:
    program = capture(Model(lambda m, x, p: x * 2))
    assert MatchRope()(program).misses == []
