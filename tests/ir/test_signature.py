"""A program knows its inputs by role, whatever they are called, and puts arguments in order."""

from __future__ import annotations

import pytest
import torch
from attending import DIM, KV_HEADS, Attending, cached, join, optimized, qkv
from check_pass import VOCAB, capture, inputs
from torch import Tensor, nn

from llmc.ir.program import Program
from llmc.ir.signature import Signature
from llmc.kernels.ops import attention
from llmc.passes.cache.select_logits import SelectLogits


def attend(m: Attending, place: int, x: Tensor, positions: Tensor) -> Tensor:
    return join(attention(*qkv(m, place, x), 0.4))


def names(program: Program) -> list[str]:
    return [str(node.target) for node in program.inputs]


def test_roles_by_name() -> None:
    assert Signature("ids", positions=None, starts="done").roles == {"ids": "tokens", "done": "starts"}
    assert Signature("tokens", "positions").roles == {"tokens": "tokens", "positions": "positions"}


def test_roles_of_a_captured_program() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(VOCAB, 4)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.embed(tokens)

    program = capture(Model())
    assert program.signature == Signature("tokens", "positions")
    assert [program.tokens, program.positions] == program.inputs
    with pytest.raises(AssertionError, match="captured program has no such input"):
        _ = program.starts


def test_a_cache_replaces_positions_by_starts() -> None:
    program = cached(attend)
    assert program.signature == Signature("tokens", positions=None, starts="starts")
    assert names(program)[:2] == ["tokens", "starts"] and program.starts is program.inputs[1]
    with pytest.raises(AssertionError, match="cached program has no such input"):
        _ = program.positions


def test_selected_logits_add_a_role() -> None:
    program = cached(attend)
    SelectLogits()(program)
    assert program.signature == Signature("tokens", positions=None, starts="starts", wanted="rows")
    assert program.copy().signature == program.signature


# Arguments ----------------------------------------------------------------------------------------------------------


def test_arguments_are_in_the_order_of_the_inputs() -> None:
    program = cached(attend)
    SelectLogits()(program)
    roles = {name: torch.tensor(i) for i, name in enumerate(("wanted", "starts", "tokens", "positions"))}
    caches = program.empty_caches(2)
    given = program.arguments(roles, caches)
    assert names(program)[:3] == ["tokens", "starts", "rows"]
    assert [int(value) for value in given[:3]] == [2, 1, 0], "positions are left out"
    assert len(given) == len(program.inputs) and all(a is b for a, b in zip(given[3:], caches, strict=True))


def test_arguments_depend_on_roles_and_not_on_names() -> None:
    program = optimized(attend)
    tokens, positions = inputs(2, 5)
    want = program(tokens, positions)
    first, second = program.inputs
    for node, name in ((first, "ids"), (second, "places")):
        node.target = node.name = name
    program.module.recompile()
    program.signature = Signature("ids", "places")
    given = program.arguments({"positions": positions, "tokens": tokens, "starts": torch.zeros(2)})
    assert torch.equal(program(*given), want)
    assert program.tokens is first and program.positions is second


def test_a_role_that_is_needed_must_be_given() -> None:
    with pytest.raises(KeyError, match="positions"):
        optimized(attend).arguments({"tokens": torch.zeros(1, 1)})


# Caches -------------------------------------------------------------------------------------------------------------


def test_a_program_without_caches_has_no_empty_ones() -> None:
    assert optimized(attend).empty_caches(3) == []


@pytest.mark.parametrize(
    ("codes", "dtype"), [(None, torch.float32), ("int8", torch.int8), ("fp8", torch.float8_e4m3fn)]
)
def test_empty_caches_fit_the_inputs(codes: str | None, dtype: torch.dtype) -> None:
    program = cached(attend, codes=codes)
    empty = program.empty_caches(3)
    assert [tuple(value.shape) for value in empty[:2]] == [(3, KV_HEADS, program.caches[0].length, DIM)] * 2
    assert empty[0].dtype == dtype and all(not value.float().any() for value in empty)
    for node, value in zip(program.inputs[2:], empty, strict=True):
        expected = node.meta["val"]
        assert value.dtype == expected.dtype and list(value.shape[1:]) == [int(size) for size in expected.shape[1:]]


def test_a_program_continues_from_empty_caches() -> None:
    program, tokens = cached(attend), inputs(2, 6)[0]
    want = optimized(attend, DIM)(*inputs(2, 6))
    caches, parts = program.empty_caches(2), []
    for start, end in ((0, 4), (4, 5), (5, 6)):
        roles = {"tokens": tokens[:, start:end], "starts": torch.tensor([start, start])}
        logits, *caches = program.run(*program.arguments(roles, caches))
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), want, atol=1e-5, rtol=0)
