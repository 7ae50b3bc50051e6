"""Reshaping, moving, selecting and concatenating in ONNX Runtime equal torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from check_lowering import check, run_in_onnx, traced
from check_pass import capture, inputs
from torch import Tensor, nn

from llmc.compiler.targets.onnx.aten import ATEN
from llmc.errors import LlmcError

aten = torch.ops.aten
WIDTH = 6


def make(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Return floats and integers of both signs, [B, S, 6]."""
    generator = torch.Generator().manual_seed(10 * batch + length)
    x = torch.randn(batch, length, WIDTH, generator=generator)
    return x, torch.randint(-9, 9, x.shape, generator=generator)


CASES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "alias": lambda x, i: x.contiguous(),
    "clone": lambda x, i: x.clone(),
    "reshape": lambda x, i: x.reshape(x.shape[0], -1),
    "reshape, all open": lambda x, i: x.reshape(-1, x.shape[1], 2, 3),
    "reshape, moved sizes": lambda x, i: x.reshape(x.shape[1], x.shape[0], WIDTH),
    "view": lambda x, i: x.view(x.shape[0] * x.shape[1], WIDTH),
    "view_as": lambda x, i: x.reshape(-1).view_as(x),
    "reshape_as": lambda x, i: x.flatten().reshape_as(i),
    "flatten": lambda x, i: (x.flatten(), x.flatten(1), x.flatten(0, 1), x.flatten(-2, -1)),
    "unflatten": lambda x, i: (x.unflatten(2, (2, 3)), x.unflatten(-1, (-1, 2)), x.unflatten(0, (1, x.shape[0]))),
    "unsqueeze": lambda x, i: (x.unsqueeze(0), x.unsqueeze(-1), x.unsqueeze(-2), x.unsqueeze(3)),
    "squeeze": lambda x, i: (
        x[:, None].squeeze(1), x[..., None].squeeze(-1), x.squeeze(2), x[0, 0][None, :, None].squeeze(),
    ),
    "squeeze, several": lambda x, i: x[None, :, None].squeeze((0, 2)),
    "transpose": lambda x, i: (x.transpose(0, 1), x.transpose(-1, 0), x.swapaxes(1, 2), x[0].t(), x[0, 0].t()),
    "permute": lambda x, i: (x.permute(2, 0, 1), x.permute(0, -1, 1)),
    "movedim": lambda x, i: (x.movedim(0, -1), x.movedim(-1, 0), x.movedim((0, 1), (2, 0))),
    "expand": lambda x, i: x[:, :, None].expand(-1, -1, 4, -1),
    "expand, in front": lambda x, i: x[0].expand(x.shape[0], -1, WIDTH),
    "expand, to a size": lambda x, i: x[:1, :, :1].expand(x.shape[0], x.shape[1], x.shape[1]),
    "expand_as": lambda x, i: x[..., :1].expand_as(i),
    "repeat": lambda x, i: (x.repeat(2, 1, 3), x[0].repeat(x.shape[0], 1, 2)),
    "repeat_interleave": lambda x, i: (
        x.repeat_interleave(3, 1), x.repeat_interleave(2, dim=0), x.repeat_interleave(2, -1), x.repeat_interleave(2),
    ),
    "slice": lambda x, i: (x[..., 1:4], x[..., -2:], x[..., :-1], x[..., 1:99], x[..., -99:2], x[..., 4:2]),
    "slice, steps": lambda x, i: (x[..., ::2], x[..., 1::2], x[:, ::3]),
    "slice, sizes": lambda x, i: (torch.cat([x, x], 1)[:, x.shape[1] :], x[:, : x.shape[1] - 1], x[:, -x.shape[1] :]),
    "narrow": lambda x, i: (x.narrow(2, 1, 3), x.narrow(2, -2, 2), torch.cat([x, x], 1).narrow(1, 1, x.shape[1])),
    "select": lambda x, i: (x[:, 0], x[..., -1], x.select(-1, 2), x[:, x.shape[1] - 1]),
    "unbind": lambda x, i: x.unbind(-1),
    "split": lambda x, i: (*x.split(4, -1), *x.split(6, 2), *x.split([1, 5], 2), *x.split_with_sizes([1, 2, 3], -1)),
    "chunk": lambda x, i: (*x.chunk(4, -1), *x.chunk(2, 2), *x.chunk(1, 2)),
    "flip": lambda x, i: (x.flip(-1), x.flip(0, 1)),
    "roll": lambda x, i: (x.roll(2, -1), x.roll(-1, 1), x.roll((7, -3), (1, 2)), x.roll(0, 1)),
    "cat": lambda x, i: (torch.cat([x, i], -1), torch.cat([x, x[:, :1]], 1), torch.cat([i, i], 0)),
    "stack": lambda x, i: (torch.stack([x, x], -1), torch.stack([i, x], 0), torch.stack([x, x, x], 2)),
    "pad": lambda x, i: (
        torch.nn.functional.pad(x, (1, 2)), torch.nn.functional.pad(x, (0, 0, 2, 0, 1, 1), value=-1.5),
        torch.nn.functional.pad(x, (-1, 2)), torch.nn.functional.pad(i, (1, 0), value=3),
        torch.nn.functional.pad(x > 0, (1, 1), value=True), aten.constant_pad_nd(x, [1, 1], 2),
    ),
    "pad, by a size": lambda x, i: torch.nn.functional.pad(x, (0, 0, 0, 8 - x.shape[1] % 8)),
    "pad, modes": lambda x, i: (
        torch.nn.functional.pad(x, (1, 2), mode="reflect"), torch.nn.functional.pad(x, (1, 2), mode="replicate"),
        torch.nn.functional.pad(x, (1, 2), mode="circular"),
    ),
    "gather": lambda x, i: (x.gather(2, i % WIDTH), x.gather(-1, i[:, :1, :2].abs() % WIDTH), i.gather(0, i * 0)),
    "index_select": lambda x, i: x.index_select(-1, i[0, 0] % WIDTH),
    "index": lambda x, i: (x[:, :, i[0, 0] % WIDTH], x[..., i[0] // 2], i[i // 9]),
    "index, adjacent": lambda x, i: (x[:, i[0, 0] * 0, i[0, 0] % WIDTH], x[i // 9, i * 0]),
    "index, not adjacent": lambda x, i: (x[i[0, 0] * 0, :, i[0, 0] % WIDTH], x[:, None, :][i * 0, :, i[0, :1] * 0 - 1]),
    "index, broadcast": lambda x, i: x.unflatten(2, (2, 3))[:, :, i[0, :, :1] % 2, i[0, 0] % 3],
    "scatter": lambda x, i: (
        x.scatter(-1, i[..., :1] % WIDTH, 1.0), x.scatter(2, i.argsort(-1), x * 2), x.scatter(2, i[..., :1] % WIDTH, x),
        (x > 0).scatter(-1, i[..., 1:2] % WIDTH, True), i.scatter(1, i[:, :1] * 0, 3),
    ),
    "scatter, reduced": lambda x, i: (
        x.scatter_add(2, i % WIDTH, x), x.scatter(2, i % WIDTH, x, reduce="add"),
        x.scatter(2, i % WIDTH, 2.0, reduce="multiply"),
    ),
    "slice_scatter": lambda x, i: (
        x.slice_scatter(i[..., :2].float(), 2, 1, 3), x.slice_scatter(i[..., :3].float(), -1, None, None, 2),
        x.slice_scatter(x[:1] * 0, 0, 0, 1), x.slice_scatter(x[:, :1] * 0, 1, -1), x.slice_scatter(x[..., :5], 2, -5),
    ),
    "select_scatter": lambda x, i: (x.select_scatter(x[..., 0] * 2, 2, -1), x.select_scatter(x[0] * 2, 0, 0)),
    "complex": lambda x, i: torch.view_as_real(
        torch.view_as_complex(x.unflatten(2, (3, 2)))
        * torch.view_as_complex(i.float().unflatten(2, (3, 2)))[:, 0].unsqueeze(1)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_views_equal_torch(name: str) -> None:
    check(CASES[name], make, ATEN)


REFUSED: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "a mask as index": (lambda x, i: x * aten.index.Tensor(x, [i > 99]).sum(), "by a mask"),
    "repeats in a tensor": (lambda x, i: torch.repeat_interleave(x, i[0, 0] * 0 + 1, 2, output_size=6), "by a tensor"),
    "a roll of no dim": (lambda x, i: x.roll(1), "of no dim"),
    "parts of a dim that is not static": (
        lambda x, i: x.chunk(1, 1)[0] + torch.cat([x, x], 1).chunk(2, 1)[0],
        "not static",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_forms_without_a_lowering_are_refused(name: str) -> None:
    function, reason = REFUSED[name]
    program = traced(function, make(2, 5))
    with pytest.raises(LlmcError, match=reason) as caught:
        run_in_onnx(program, ATEN)
    assert caught.value.code == "OP_UNSUPPORTED"


class _Parts(nn.Module):
    """Selects parts of a dimension, two of them by indices in buffers.

    ONNX Runtime merges them into one Split, for which it must know the indices.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.tensor([-1]))
        self.register_buffer("other", torch.tensor([-2]))

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = (tokens[..., None] * torch.arange(6.0)).unflatten(2, (3, 2))
        return torch.cat([x[:, :, :-2].flatten(2), x[:, :, self.other].flatten(2), x[:, :, self.last].flatten(2)], -1)


def test_indices_in_buffers_are_stored_in_the_graph() -> None:
    program = capture(_Parts())
    run = run_in_onnx(program, ATEN)
    sample = inputs(2, 7)
    torch.testing.assert_close(run(*sample)[0], program(*sample), rtol=0, atol=0)
