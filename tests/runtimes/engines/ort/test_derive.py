"""Derived matrices have exactly the integer values of the stored codes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from llmc.kernels.ops import round_weight
from llmc.kernels.ops.quantized import decode, pack_nibbles
from llmc.kernels.ops.rounding import LARGEST_MULTIPLE
from llmc.runtimes.engines.ort.derive import derive, write_derived
from llmc.runtimes.engines.ort.section import DerivedSpec

OUTPUTS, INPUTS = 6, 96
OFFSET = 4096


def weight() -> torch.Tensor:
    return torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, INPUTS)


def write(folder: Path, *parts: torch.Tensor | None) -> list[int | None]:
    """Write a data file; return the offset of each part."""
    content, offsets = bytes(OFFSET), []
    for part in parts:
        offsets.append(None if part is None else len(content))
        content += b"" if part is None else part.numpy().tobytes()
    (folder / "data").write_bytes(content)
    return offsets


def derive_int4(folder: Path, group: int, *parts: torch.Tensor | None) -> np.ndarray:
    """Derive a matrix from 4-bit codes, packed zero points and multiples."""
    offsets = write(folder, *parts)
    matrix = derive(folder, DerivedSpec("w", "int4", OUTPUTS, INPUTS, group, "data", *offsets, OFFSET))  # type: ignore
    assert (matrix.shape, matrix.dtype, matrix.flags.c_contiguous) == ((INPUTS, OUTPUTS), np.int8, True)
    return matrix


@pytest.mark.parametrize("group", [16, 32, 96])
def test_four_bits(tmp_path: Path, group: int) -> None:
    codes, _, _, multiples = round_weight(weight(), "int4", group)
    multiples[0, 0] = -LARGEST_MULTIPLE[True]  # with code 0, which means -8, the largest possible product
    codes[0, 0] = 0
    want = decode(codes, None, "int4", group, torch.int32, multiples).flatten(1).T
    assert want.max() == 120
    assert np.array_equal(derive_int4(tmp_path, group, codes, None, multiples), want.numpy())


@pytest.mark.parametrize("group", [16, 32, 96])
def test_four_bits_with_zero_points(tmp_path: Path, group: int) -> None:
    """Two zero points share a byte, but each output channel starts at a new byte."""
    codes, _, zeros, multiples = round_weight(weight(), "int4", group, symmetric=False)
    # The largest possible products of either sign.
    codes[0, 0], zeros[0, 0], multiples[0, 0] = 0xFF, 0, LARGEST_MULTIPLE[False]
    codes[1, 0], zeros[1, 0], multiples[1, 0] = 0x00, 15, LARGEST_MULTIPLE[False]
    want = decode(codes, zeros, "int4", group, torch.int32, multiples).flatten(1).T
    assert (want.max(), want.min()) == (120, -120) and (group == 96 or len(zeros.unique()) > 4)
    even = torch.nn.functional.pad(zeros, (0, zeros.shape[1] % 2))
    assert np.array_equal(derive_int4(tmp_path, group, codes, pack_nibbles(even), multiples), want.numpy())


def test_four_bits_without_multiples(tmp_path: Path) -> None:
    codes = round_weight(weight(), "int4", 32)[0]
    want = decode(codes, None, "int4", 32, torch.int32).flatten(1).T
    assert np.array_equal(derive_int4(tmp_path, 32, codes, None, None), want.numpy())


def test_eight_bits(tmp_path: Path) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(3)[: OUTPUTS * INPUTS].view(OUTPUTS, INPUTS)
    (offset,) = write(tmp_path, codes)
    assert offset is not None
    matrix = derive(tmp_path, DerivedSpec("w", "int8", OUTPUTS, INPUTS, INPUTS, "data", offset, None, None, OFFSET))
    assert matrix.flags.c_contiguous and np.array_equal(matrix, codes.numpy().astype(np.int16).T - 128)


@pytest.mark.parametrize("threads", [1, 3])
def test_matrices_are_written_at_their_offsets(tmp_path: Path, threads: int) -> None:
    codes = round_weight(weight(), "int8", INPUTS)[0]
    (offset,) = write(tmp_path, codes.view(torch.uint8) ^ 128)
    assert offset is not None
    starts = [OFFSET, 0, 3 * OFFSET]
    specs = [DerivedSpec("w", "int8", OUTPUTS, INPUTS, INPUTS, "data", offset, None, None, start) for start in starts]
    write_derived(tmp_path, specs, tmp_path / "derived", threads)
    content = (tmp_path / "derived").read_bytes()
    assert len(content) == 3 * OFFSET + codes.numel()
    for start in starts:
        assert content[start : start + codes.numel()] == codes.T.numpy().tobytes()
