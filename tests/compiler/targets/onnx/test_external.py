"""The data file is aligned; each value is computed and stored once."""

from __future__ import annotations

from pathlib import Path

import torch

from llmc.compiler.targets.onnx.external import LINE, PAGE, ExternalData
from llmc.ir.weights import constant, record, recorded, slice_dim0, transpose


def test_small_tensors_are_aligned_to_lines_and_large_ones_to_pages(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(7.0),
        "b": torch.arange(600_000).to(torch.int16),
        "c": torch.ones(2, 3, dtype=torch.bool),
        "d": torch.arange(5).to(torch.int8),
    }
    with ExternalData(tmp_path / "data") as data:
        locations = {name: data.add(name, constant(tensor, name)) for name, tensor in tensors.items()}
    stored = (tmp_path / "data").read_bytes()
    after = PAGE + 1_200_000
    assert [p.offset for p in locations.values()] == [0, PAGE, after, after + LINE] and after % LINE == 0
    for name, tensor in tensors.items():
        location = locations[name]
        assert location.file == "data"
        assert stored[location.offset : location.offset + location.length] == tensor.numpy().tobytes()
    assert len(stored) == locations["d"].offset + locations["d"].length


def test_slices_of_output_channels_are_located_in_the_whole(tmp_path: Path) -> None:
    tensor = torch.arange(24.0).view(6, 4)
    whole = constant(tensor, "w")
    parts = {
        "output channels": slice_dim0(whole, 2, 5),
        "negative start": recorded(record(whole)[-2:]),
        "input channels": recorded(record(whole)[:, 1:3]),
    }
    with ExternalData(tmp_path / "data") as data:
        locations = {name: data.add(name, part) for name, part in parts.items()}
        first = data.add("w", whole)
    stored = (tmp_path / "data").read_bytes()
    for name, expected in {
        "output channels": tensor[2:5],
        "negative start": tensor[-2:],
        "input channels": tensor[:, 1:3].contiguous(),
    }.items():
        location = locations[name]
        assert stored[location.offset : location.offset + location.length] == expected.numpy().tobytes(), name
    assert locations["output channels"].offset == first.offset + 2 * 16


def test_equal_bytes_are_written_once(tmp_path: Path) -> None:
    one = torch.arange(12.0).view(3, 4)
    with ExternalData(tmp_path / "data") as data:
        first = data.add("one", constant(one, "one"))
        assert data.add("other", constant(one.clone(), "other")) == first
        assert data.add("turned", transpose(constant(one, "one"))) != first
        assert data.add("back", transpose(transpose(constant(one, "one")))) == first
    assert (tmp_path / "data").stat().st_size == LINE + 48


def test_a_weight_is_computed_once(tmp_path: Path) -> None:
    seen: list[str] = []
    weight = constant(torch.arange(3.0), "w")
    with ExternalData(tmp_path / "data", seen.append) as data:
        data.add("first", weight)
        data.add("second", weight)
    assert seen == ["first"]


def test_without_weights_there_is_no_file(tmp_path: Path) -> None:
    with ExternalData(tmp_path / "data"):
        pass
    assert not (tmp_path / "data").exists()
