"""Repacking is exact for every byte and reads its argument once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from llmc.compiler.frontend.prequantized.layout import (
    expression,
    fields,
    packed_nibbles,
    raw_bytes,
    repeated,
    signed,
    swapped_nibbles,
    wide,
)
from llmc.ir.weights import Leaf, TensorSource, Weight
from llmc.kernels.ops.quantized import pack_nibbles

BYTES = torch.arange(256, dtype=torch.uint8)


@dataclass(frozen=True)
class Counted(TensorSource):
    reads: list[str] = field(default_factory=list)

    def read(self) -> Tensor:
        self.reads.append(self.name)
        return super().read()


def evaluated(compute: Callable[[Weight], Weight], tensor: Tensor) -> Tensor:
    """Evaluate a weight expression that must read its argument lazily and once."""
    source = Counted(tensor, "argument")
    weight = compute(Leaf(source))
    assert not source.reads, "building the expression must not read the tensor"
    value = weight.evaluate()
    assert source.reads == ["argument"], "evaluation must read the tensor once"
    assert (tuple(value.shape), value.dtype) == (weight.shape, weight.dtype)
    return value


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_fields(bits: int) -> None:
    want = [byte >> shift & (2**bits - 1) for byte in range(256) for shift in range(0, 8, bits)]
    assert evaluated(lambda w: fields(w, bits), BYTES).tolist() == want


def test_nibbles() -> None:
    assert evaluated(swapped_nibbles, BYTES).tolist() == [byte % 16 * 16 + byte // 16 for byte in range(256)]
    codes = torch.stack((BYTES % 16, BYTES // 16), 1).flatten().view(16, 32)
    assert torch.equal(evaluated(packed_nibbles, codes), BYTES.view(16, 16))
    assert torch.equal(pack_nibbles(codes), BYTES.view(16, 16))


def test_signed_codes() -> None:
    assert evaluated(signed, BYTES).tolist() == list(range(-128, 128))


def test_raw_bytes_are_lowest_first() -> None:
    words = torch.tensor([[0x04030201, -1]], dtype=torch.int32)
    assert evaluated(raw_bytes, words).tolist() == [[1, 2, 3, 4, 255, 255, 255, 255]]


@pytest.mark.parametrize(
    ("times", "length", "want"), [(1, 3, [1, 2, 3]), (2, 6, [1, 1, 2, 2, 3, 3]), (2, 5, [1, 1, 2, 2, 3])]
)
def test_repeated(times: int, length: int, want: list[int]) -> None:
    tensor = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert evaluated(lambda w: repeated(w, times, length), tensor)[0].tolist() == want


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_wide_scales_keep_their_values(dtype: torch.dtype) -> None:
    value = evaluated(wide, torch.tensor([0.5, 2.0]).to(dtype))
    assert value.dtype == torch.float32 and value.tolist() == [0.5, 2.0]


def test_an_expression_of_two_weights() -> None:
    one, other = (Leaf(TensorSource(torch.tensor([n]), str(n))) for n in (1, 2))
    assert expression(lambda a, b: a - b, one, other).evaluate().tolist() == [-1]
