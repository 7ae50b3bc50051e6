"""The layouts of quantized weights match the kernels, for any codes and shapes."""

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
from llmc.compiler.targets.onnx.quantized_matrix import QuantizedMatrix
from llmc.compiler.targets.ort.facts import FASTEST_GROUPS
from llmc.ir.weights import Weight, constant, slice_dim0
from llmc.kernels.ops.quantized import pack_nibbles, unpack_nibbles


class Written:
    """A graph whose weights can be read back."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "data"
        self.data = ExternalData(self.file)
        self.graph = OnnxGraph(self.data)

    def read(self, name: str) -> np.ndarray:
        self.data.flush()
        location = {e.key: e.value for e in self.graph.initializers[name].external_data}
        return np.fromfile(self.file, np.uint8, int(location["length"]), offset=int(location["offset"]))


@pytest.fixture
def written(tmp_path: Path) -> Iterator[Written]:
    written = Written(tmp_path)
    with written.data:
        yield written


def matrix(codes: Weight, zeros: Weight | None, scheme: str, group: int) -> QuantizedMatrix:
    scales = constant(torch.ones(codes.shape[0], 1), "scales")
    values = (
        WeightValue.of(n, w) if w is not None else None
        for n, w in (("codes", codes), ("scales", scales), ("zeros", zeros))
    )
    codes_, scales_, zeros_ = values
    assert codes_ is not None and scales_ is not None
    return QuantizedMatrix(codes_, scales_, zeros_, None, scheme, group)


def shapes() -> Iterator[tuple[int, int, int]]:
    """Yield random numbers of output channels, groups and inputs per group."""
    random = np.random.default_rng(0)
    for _ in range(12):
        yield int(random.integers(1, 9)), int(random.integers(1, 9)), 16 * int(random.integers(1, 5))


def any_codes(*shape: int) -> Tensor:
    """Return random 4-bit codes; all codes occur if there are at least 16."""
    return (torch.randperm(torch.Size(shape).numel()) % 16).to(torch.uint8).view(shape)


def nibbles(data: np.ndarray) -> Tensor:
    return unpack_nibbles(torch.from_numpy(data))


@pytest.mark.parametrize("shape", shapes())
def test_4_bit_codes(written: Written, shape: tuple[int, int, int]) -> None:
    channels, groups, group = shape
    codes = any_codes(channels, groups * group)
    weight = matrix(constant(pack_nibbles(codes), "codes"), None, "int4", group)
    assert (weight.output_channels, weight.input_channels) == codes.shape
    value = weight.unsigned(written.graph, (channels, groups, group // 2))  # type: ignore[arg-type]
    assert torch.equal(nibbles(written.read(value)), codes.flatten())
    high = written.read(weight.high_nibble_first(written.graph))  # type: ignore[arg-type]
    assert torch.equal(torch.from_numpy(np.stack((high >> 4, high & 15), -1)).flatten(), codes.flatten())


def test_8_bit_codes(written: Written) -> None:
    codes = torch.arange(-128, 128, dtype=torch.int8).view(4, 64)
    weight = matrix(constant(codes, "codes"), None, "int8", 64)
    value = weight.unsigned(written.graph, (4, 64))  # type: ignore[arg-type]
    assert written.read(value).tolist() == list(range(256))


@pytest.mark.parametrize("shape", shapes())
@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_zero_points_of_blocks(written: Written, shape: tuple[int, int, int], scheme: str) -> None:
    """Blocks may be smaller than groups; output channels are padded to bytes."""
    channels, groups, group = shape
    zeros = (
        any_codes(channels, groups)
        if scheme == "int4"
        else torch.randint(-128, 128, (channels, groups), dtype=torch.int8)
    )
    codes = torch.zeros(channels, groups * group, dtype=zeros.dtype)
    weight = matrix(constant(pack_nibbles(codes) if scheme == "int4" else codes, "codes"),
                    constant(zeros, "zeros"), scheme, group)  # fmt: skip
    value = weight.unsigned_zeros(written.graph, 16)  # type: ignore[arg-type]
    stored = torch.from_numpy(written.read(str(value))).view(channels, -1)
    got = unpack_nibbles(stored)[:, : groups * group // 16] if scheme == "int4" else stored.int() - 128
    assert torch.equal(got.int(), zeros.repeat_interleave(group // 16, 1).int())
    if scheme == "int4" and groups * group // 16 % 2:
        assert not (stored[:, -1] >> 4).any()


@pytest.mark.parametrize("shape", shapes())
@pytest.mark.parametrize("has_zeros", [True, False])
def test_zero_points_as_elements(written: Written, shape: tuple[int, int, int], has_zeros: bool) -> None:
    """In standard ONNX, output channels are not padded to bytes; the default is 8."""
    channels, groups, group = shape
    zeros = any_codes(channels, groups)
    codes = constant(torch.zeros(channels, groups * group // 2, dtype=torch.uint8), "codes")
    weight = matrix(codes, constant(zeros, "zeros") if has_zeros else None, "int4", group)
    value = weight.element_zeros(written.graph, (channels, groups))  # type: ignore[arg-type]
    got = nibbles(written.read(str(value)))[: channels * groups]
    assert torch.equal(got, zeros.flatten() if has_zeros else torch.full_like(got, 8))


@pytest.mark.parametrize(
    ("scheme", "layout"), [("int8", "unsigned"), ("int4", "unsigned"), ("nf4", "high_nibble_first")]
)
def test_slices_of_output_channels_are_located_in_the_whole(written: Written, scheme: str, layout: str) -> None:
    """Slices of merged layers need no storage of their own."""
    codes = torch.randint(0, 100, (6, 32), dtype=torch.int8 if scheme == "int8" else torch.uint8)
    zeros = torch.randint(0, 16, (6, 1), dtype=codes.dtype)
    whole, whole_zeros = constant(codes, "codes"), constant(zeros, "zeros")

    def layouts(codes: Weight, zeros: Weight, graph: OnnxGraph) -> list[str]:
        weight = matrix(codes, zeros, scheme, 32 if scheme == "int8" else 64)
        shape = ((weight.output_channels, 32),) if layout == "unsigned" else ()
        names = [getattr(weight, layout)(graph, *shape)]
        return names if scheme == "nf4" else [*names, weight.unsigned_zeros(graph, 16)]  # type: ignore[arg-type, list-item]

    expected = [written.read(name).reshape(6, -1)[2:5].ravel() for name in layouts(whole, whole_zeros, written.graph)]
    size = written.file.stat().st_size
    written.graph = OnnxGraph(written.data)
    names = layouts(slice_dim0(whole, 2, 5), slice_dim0(whole_zeros, 2, 5), written.graph)
    for name, stored in zip(names, expected, strict=True):
        assert np.array_equal(written.read(name), stored)
    assert written.file.stat().st_size == size


def test_the_block_of_kernels() -> None:
    """It is the group size, or a supported size that divides it."""
    codes = constant(torch.zeros(2, 768, dtype=torch.int8), "codes")
    zeros = constant(torch.zeros(2, 1, dtype=torch.int8), "zeros")
    blocks = [matrix(codes, points, "int8", 768).block(FASTEST_GROUPS) for points in (zeros, None)]
    assert blocks == [128, 128]
    group_zeros = constant(torch.zeros(2, 3, dtype=torch.int8), "zeros")
    for group, block in ((256, 256), (128, 128), (96, 32), (48, 16), (16, 16), (24, None)):
        assert matrix(codes, group_zeros, "int8", group).block(FASTEST_GROUPS) == block
