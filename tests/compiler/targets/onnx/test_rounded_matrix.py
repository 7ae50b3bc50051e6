"""The layouts of rounded weights: whatever the codes and shapes, every number is where its kernel looks for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from llmc.compiler.targets.onnx.external import ExternalData
from llmc.compiler.targets.onnx.graph import OnnxGraph
from llmc.compiler.targets.onnx.lower import WeightValue
from llmc.compiler.targets.onnx.rounded_matrix import RoundedMatrix
from llmc.ir.weights import Weight, constant, rows
from llmc.kernels.ops.quantized import pack_nibbles, unpack_nibbles


class Written:
    """A graph whose weights can be read back."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "data"
        self.data = ExternalData(self.file)
        self.graph = OnnxGraph(self.data)

    def read(self, name: str) -> np.ndarray:
        assert self.data._file is not None
        self.data._file.flush()
        at = {e.key: e.value for e in self.graph.initializers[name].external_data}
        return np.fromfile(self.file, np.uint8, int(at["length"]), offset=int(at["offset"]))


@pytest.fixture
def written(tmp_path: Path) -> Iterator[Written]:
    found = Written(tmp_path)
    with found.data:
        yield found


def matrix(codes: Weight, zeros: Weight | None, scheme: str, group: int) -> RoundedMatrix:
    scales = constant(torch.ones(codes.shape[0], 1), "scales")
    values = (
        WeightValue.of(n, w) if w is not None else None
        for n, w in (("codes", codes), ("scales", scales), ("zeros", zeros))
    )
    codes_, scales_, zeros_ = values
    assert codes_ is not None and scales_ is not None
    return RoundedMatrix(codes_, scales_, zeros_, None, scheme, group)


def shapes() -> Iterator[tuple[int, int, int]]:
    """Rows, groups of a row, inputs of a group."""
    random = np.random.default_rng(0)
    for _ in range(12):
        yield int(random.integers(1, 9)), int(random.integers(1, 9)), 16 * int(random.integers(1, 5))


def any_codes(*shape: int) -> Tensor:
    """Codes of 4 bits; all of them, if there is room."""
    return (torch.randperm(torch.Size(shape).numel()) % 16).to(torch.uint8).view(shape)


def nibbles(data: np.ndarray) -> Tensor:
    return unpack_nibbles(torch.from_numpy(data))


@pytest.mark.parametrize("shape", shapes())
def test_codes_of_four_bits(written: Written, shape: tuple[int, int, int]) -> None:
    count, groups, group = shape
    codes = any_codes(count, groups * group)
    found = matrix(constant(pack_nibbles(codes), "codes"), None, "int4", group)
    assert (found.rows, found.columns) == codes.shape
    value = found.unsigned(written.graph, (count, groups, group // 2))  # type: ignore[arg-type]
    assert torch.equal(nibbles(written.read(value)), codes.flatten())
    high = written.read(found.high_nibble_first(written.graph))  # type: ignore[arg-type]
    assert torch.equal(torch.from_numpy(np.stack((high >> 4, high & 15), -1)).flatten(), codes.flatten())


def test_codes_of_eight_bits(written: Written) -> None:
    codes = torch.arange(-128, 128, dtype=torch.int8).view(4, 64)
    found = matrix(constant(codes, "codes"), None, "int8", 64)
    value = found.unsigned(written.graph, (4, 64))  # type: ignore[arg-type]
    assert written.read(value).tolist() == list(range(256))


@pytest.mark.parametrize("shape", shapes())
@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_zero_points_of_blocks(written: Written, shape: tuple[int, int, int], scheme: str) -> None:
    """A kernel may read smaller blocks than the groups; each row begins with a byte of its own."""
    count, groups, group = shape
    zeros = (
        any_codes(count, groups) if scheme == "int4" else torch.randint(-128, 128, (count, groups), dtype=torch.int8)
    )
    codes = torch.zeros(count, groups * group, dtype=zeros.dtype)
    found = matrix(constant(pack_nibbles(codes) if scheme == "int4" else codes, "codes"),
                   constant(zeros, "zeros"), scheme, group)  # fmt: skip
    value = found.unsigned_zeros(written.graph, 16)  # type: ignore[arg-type]
    stored = torch.from_numpy(written.read(str(value))).view(count, -1)
    got = unpack_nibbles(stored)[:, : groups * group // 16] if scheme == "int4" else stored.int() - 128
    assert torch.equal(got.int(), zeros.repeat_interleave(group // 16, 1).int())
    if scheme == "int4" and groups * group // 16 % 2:
        assert not (stored[:, -1] >> 4).any()


@pytest.mark.parametrize("shape", shapes())
@pytest.mark.parametrize("given", [True, False])
def test_zero_points_as_elements(written: Written, shape: tuple[int, int, int], given: bool) -> None:
    """In the standard they lie one behind the other, in rows of an odd number too; without them they are 8."""
    count, groups, group = shape
    zeros = any_codes(count, groups)
    codes = constant(torch.zeros(count, groups * group // 2, dtype=torch.uint8), "codes")
    found = matrix(codes, constant(zeros, "zeros") if given else None, "int4", group)
    value = found.element_zeros(written.graph, (count, groups))  # type: ignore[arg-type]
    got = nibbles(written.read(str(value)))[: count * groups]
    assert torch.equal(got, zeros.flatten() if given else torch.full_like(got, 8))


@pytest.mark.parametrize(
    ("scheme", "layout"), [("int8", "unsigned"), ("int4", "unsigned"), ("nf4", "high_nibble_first")]
)
def test_rows_of_a_weight_lie_in_the_whole(written: Written, scheme: str, layout: str) -> None:
    """The parts of merged layers are written with the whole."""
    codes = torch.randint(0, 100, (6, 32), dtype=torch.int8 if scheme == "int8" else torch.uint8)
    zeros = torch.randint(0, 16, (6, 1), dtype=codes.dtype)
    whole, points = constant(codes, "codes"), constant(zeros, "zeros")

    def layouts(codes: Weight, zeros: Weight, graph: OnnxGraph) -> list[str]:
        found = matrix(codes, zeros, scheme, 32 if scheme == "int8" else 64)
        more = ((found.rows, 32),) if layout == "unsigned" else ()
        made = [getattr(found, layout)(graph, *more)]
        return made if scheme == "nf4" else [*made, found.unsigned_zeros(graph, 16)]  # type: ignore[arg-type, list-item]

    full = [written.read(name) for name in layouts(whole, points, written.graph)]
    size = written.file.stat().st_size
    written.graph = OnnxGraph(written.data)
    for name, all_rows in zip(layouts(rows(whole, 2, 5), rows(points, 2, 5), written.graph), full, strict=True):
        assert np.array_equal(written.read(name), all_rows.reshape(6, -1)[2:5].ravel())
    assert written.file.stat().st_size == size


def test_codes_times_spacing_in_blocks() -> None:
    """Which blocks kernels read: the groups as they are, or what divides them."""
    byte = constant(torch.zeros(2, 768, dtype=torch.int8), "codes")
    zeros = constant(torch.zeros(2, 1, dtype=torch.int8), "zeros")
    assert [matrix(byte, zeros, "int8", 768).block, matrix(byte, None, "int8", 768).block] == [128, 128]
    many = constant(torch.zeros(2, 3, dtype=torch.int8), "zeros")
    assert [matrix(byte, many, "int8", group).block for group in (256, 128, 96, 48, 16, 24)] == [
        256,
        128,
        32,
        16,
        16,
        None,
    ]
