"""MatchConcat replaces buffers that are filled completely."""

from __future__ import annotations

from collections.abc import Callable

import torch
from check_pass import VOCAB, check_pass
from torch import Tensor, nn

from llmc.passes.match.match_concat import MatchConcat


class Filled(nn.Module):
    """A model that fills a buffer from two values: `fill(buffer, a, b)`."""

    def __init__(self, fill: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 12)
        self.head = nn.Linear(12, VOCAB)
        self.fill = fill

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(self.fill(x.new_empty(x.shape), x[..., :5].sin(), x[..., 5:].cos()))


def in_order(buffer: Tensor, a: Tensor, b: Tensor) -> Tensor:
    buffer[..., :5] = a
    buffer[..., 5:] = b
    return buffer


def last_first(buffer: Tensor, a: Tensor, b: Tensor) -> Tensor:
    buffer[..., -7:] = b
    buffer[..., :-7] = a
    return buffer


def broadcast(buffer: Tensor, a: Tensor, b: Tensor) -> Tensor:
    buffer[..., :5] = a[:, :, :1]
    buffer[..., 5:] = b
    return buffer


def with_a_gap(buffer: Tensor, a: Tensor, b: Tensor) -> Tensor:
    buffer = torch.zeros_like(buffer)
    buffer[..., :4] = a[..., :4]
    buffer[..., 5:] = b
    return buffer


def overlapping(buffer: Tensor, a: Tensor, b: Tensor) -> Tensor:
    buffer[..., :6] = torch.cat([a, b[..., :1]], -1)
    buffer[..., 5:] = b
    return buffer


def two_dims(buffer: Tensor, a: Tensor, b: Tensor) -> Tensor:
    buffer = torch.zeros_like(buffer)
    buffer[..., :5] = a
    buffer[:, :1, :] = a[:, :1, :1]
    return buffer


def into_a_computed(buffer: Tensor, a: Tensor, b: Tensor) -> Tensor:
    full = torch.cat([a, b], -1) + 0.0
    full[..., :5] = a * 2
    full[..., 5:] = b * 3
    return full


def test_pieces_in_order() -> None:
    check_pass(MatchConcat(), Filled(in_order), matches=3, gone={"aten.slice_scatter", "aten.copy"}, there={"aten.cat"})


def test_pieces_in_reverse_order() -> None:
    check_pass(MatchConcat(), Filled(last_first), matches=3, gone={"aten.slice_scatter"}, there={"aten.cat"})


def test_a_copy_that_broadcasts() -> None:
    check_pass(MatchConcat(), Filled(broadcast), matches=3, gone={"aten.copy", "aten.slice_scatter"})


def test_leaves_a_gap() -> None:
    check_pass(MatchConcat(), Filled(with_a_gap), matches=2, there={"aten.slice_scatter"}, miss="gap or overlap")


def test_leaves_pieces_that_overlap() -> None:
    check_pass(MatchConcat(), Filled(overlapping), matches=2, there={"aten.slice_scatter"}, miss="gap or overlap")


def test_leaves_pieces_along_two_dims() -> None:
    check_pass(MatchConcat(), Filled(two_dims), matches=2, there={"aten.slice_scatter"}, miss="several dims")


def test_leaves_pieces_in_a_computed_tensor() -> None:
    check_pass(MatchConcat(), Filled(into_a_computed), matches=2, there={"aten.slice_scatter"}, miss="no new buffer")
