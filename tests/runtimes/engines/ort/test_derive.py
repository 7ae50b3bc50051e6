"""Integer matrices in another layout: the numbers that the codes stand for, exactly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from llmc.kernels.ops import round_weight
from llmc.kernels.ops.quantized import decode, pack_nibbles
from llmc.kernels.ops.rounding import LARGEST_MULTIPLE
from llmc.runtimes.artifact.manifest import DerivedSpec
from llmc.runtimes.engines.ort.derive import derive, write_derived

ROWS, COLUMNS = 6, 96
AT = 4096


def weight() -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, COLUMNS)


def write(folder: Path, *parts: torch.Tensor | None) -> list[int | None]:
    """A data file; the offsets of the parts."""
    content, offsets = bytes(AT), []
    for part in parts:
        offsets.append(None if part is None else len(content))
        content += b"" if part is None else part.numpy().tobytes()
    (folder / "data").write_bytes(content)
    return offsets


def of_nibbles(folder: Path, group: int, *parts: torch.Tensor | None) -> np.ndarray:
    """What is derived of 4-bit codes, zero points as they are stored, and multiples."""
    offsets = write(folder, *parts)
    matrix = derive(folder, DerivedSpec("w", "int4", ROWS, COLUMNS, group, "data", *offsets, AT))  # type: ignore
    assert (matrix.shape, matrix.dtype, matrix.flags.c_contiguous) == ((COLUMNS, ROWS), np.int8, True)
    return matrix


@pytest.mark.parametrize("group", [16, 32, 96])
def test_four_bits(tmp_path: Path, group: int) -> None:
    codes, _, _, multiples = round_weight(weight(), "int4", group)
    multiples[0, 0] = -LARGEST_MULTIPLE[True]  # with a code of -8 the largest product that there is
    codes[0, 0] = 0
    want = decode(codes, None, "int4", group, torch.int32, multiples).flatten(1).T
    assert want.max() == 120
    assert np.array_equal(of_nibbles(tmp_path, group, codes, None, multiples), want.numpy())


@pytest.mark.parametrize("group", [16, 32, 96])
def test_four_bits_with_zero_points(tmp_path: Path, group: int) -> None:
    """Two zero points share a byte; rows of an odd number of them begin with a byte of their own."""
    codes, _, zeros, multiples = round_weight(weight(), "int4", group, symmetric=False)
    # The largest products that there are, of either sign.
    codes[0, 0], zeros[0, 0], multiples[0, 0] = 0xFF, 0, LARGEST_MULTIPLE[False]
    codes[1, 0], zeros[1, 0], multiples[1, 0] = 0x00, 15, LARGEST_MULTIPLE[False]
    want = decode(codes, zeros, "int4", group, torch.int32, multiples).flatten(1).T
    assert (want.max(), want.min()) == (120, -120) and (group == 96 or len(zeros.unique()) > 4)
    even = torch.nn.functional.pad(zeros, (0, zeros.shape[1] % 2))
    assert np.array_equal(of_nibbles(tmp_path, group, codes, pack_nibbles(even), multiples), want.numpy())


def test_four_bits_without_multiples(tmp_path: Path) -> None:
    codes = round_weight(weight(), "int4", 32)[0]
    want = decode(codes, None, "int4", 32, torch.int32).flatten(1).T
    assert np.array_equal(of_nibbles(tmp_path, 32, codes, None, None), want.numpy())


def test_eight_bits(tmp_path: Path) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(3)[: ROWS * COLUMNS].view(ROWS, COLUMNS)
    (offset,) = write(tmp_path, codes)
    assert offset is not None
    matrix = derive(tmp_path, DerivedSpec("w", "int8", ROWS, COLUMNS, COLUMNS, "data", offset, None, None, AT))
    assert matrix.flags.c_contiguous and np.array_equal(matrix, codes.numpy().astype(np.int16).T - 128)


@pytest.mark.parametrize("threads", [1, 3])
def test_matrices_lie_where_they_are_looked_for(tmp_path: Path, threads: int) -> None:
    codes = round_weight(weight(), "int8", COLUMNS)[0]
    (offset,) = write(tmp_path, codes.view(torch.uint8) ^ 128)
    assert offset is not None
    places = [AT, 0, 3 * AT]
    specs = [DerivedSpec("w", "int8", ROWS, COLUMNS, COLUMNS, "data", offset, None, None, place) for place in places]
    write_derived(tmp_path, specs, tmp_path / "made", threads)
    content = (tmp_path / "made").read_bytes()
    assert len(content) == 3 * AT + codes.numel()
    for place in places:
        assert content[place : place + codes.numel()] == codes.T.numpy().tobytes()
