"""Integer matrices in another layout: the numbers that the codes stand for, exactly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from llmc.kernels.ops.quantized import decode
from llmc.kernels.ops.rounding import LARGEST_MULTIPLE, round_int4, round_int8
from llmc.runtimes.derive import derive, write_derived
from llmc.runtimes.manifest import DerivedSpec

ROWS, COLUMNS = 6, 96
AT = 4096


def weight() -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, COLUMNS)


def write(folder: Path, *parts: torch.Tensor) -> list[int]:
    """A data file; the offsets of the parts."""
    content, offsets = bytes(AT), []
    for part in parts:
        offsets.append(len(content))
        content += part.numpy().tobytes()
    (folder / "data").write_bytes(content)
    return offsets


@pytest.mark.parametrize("group", [16, 32, 96])
def test_four_bits(tmp_path: Path, group: int) -> None:
    codes, scales, multiples = round_int4(weight(), group)
    multiples[0, 0] = -LARGEST_MULTIPLE  # with a code of -8 the largest product that there is
    codes[0, 0] = 0
    offsets = write(tmp_path, codes, scales, scales * multiples)
    matrix = derive(tmp_path, DerivedSpec("w", "int4", ROWS, COLUMNS, group, "data", *offsets, AT))
    want = decode(codes, None, "int4", group, torch.int32, multiples).flatten(1).T
    assert (matrix.shape, matrix.dtype, matrix.flags.c_contiguous) == ((COLUMNS, ROWS), np.int8, True)
    assert want.max() == 120 and np.array_equal(matrix, want.numpy())


def test_multiples_are_found_in_any_steps(tmp_path: Path) -> None:
    """A step is a product of two floats: what it is a multiple of comes back exactly, for every scale."""
    multiples = torch.tensor([m for m in range(-LARGEST_MULTIPLE, LARGEST_MULTIPLE + 1) if m], dtype=torch.int8)
    scales = torch.rand(5000, 1, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.randint(-30, 30, (5000, 1))
    steps = scales * multiples
    codes = torch.full((5000, 8 * len(multiples)), 0x99, dtype=torch.uint8)  # all numbers are 1
    offsets = write(tmp_path, codes, scales, steps)
    matrix = derive(tmp_path, DerivedSpec("w", "int4", 5000, 16 * len(multiples), 16, "data", *offsets, AT))
    assert np.array_equal(matrix, multiples.repeat_interleave(16)[:, None].expand(-1, 5000).numpy())


def test_four_bits_without_steps(tmp_path: Path) -> None:
    codes, scales, _ = round_int4(weight(), 32)
    spec = DerivedSpec("w", "int4", ROWS, COLUMNS, 32, "data", *write(tmp_path, codes, scales), None, AT)
    assert np.array_equal(derive(tmp_path, spec), decode(codes, None, "int4", 32, torch.int32).flatten(1).T.numpy())


def test_eight_bits(tmp_path: Path) -> None:
    codes, scales = round_int8(weight())
    offsets = write(tmp_path, codes.view(torch.uint8) ^ 128, scales)
    matrix = derive(tmp_path, DerivedSpec("w", "int8", ROWS, COLUMNS, COLUMNS, "data", *offsets, None, AT))
    assert matrix.flags.c_contiguous and np.array_equal(matrix, codes.T.numpy())


@pytest.mark.parametrize("threads", [1, 3])
def test_matrices_lie_where_they_are_looked_for(tmp_path: Path, threads: int) -> None:
    codes, scales = round_int8(weight())
    offsets = write(tmp_path, codes.view(torch.uint8) ^ 128, scales)
    places = [AT, 0, 3 * AT]
    specs = [DerivedSpec("w", "int8", ROWS, COLUMNS, COLUMNS, "data", *offsets, None, place) for place in places]
    write_derived(tmp_path, specs, tmp_path / "made", threads)
    content = (tmp_path / "made").read_bytes()
    assert len(content) == 3 * AT + codes.numel()
    for place in places:
        assert content[place : place + codes.numel()] == codes.T.numpy().tobytes()
