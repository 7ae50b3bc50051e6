"""The data file: aligned, each value once, computed no more often than needed."""

from __future__ import annotations

from pathlib import Path

import torch

from llmc.compiler.targets.onnx.external import LINE, PAGE, ExternalData
from llmc.ir.weights import constant, record, recorded, rows, transpose


def test_tensors_lie_behind_one_another_on_lines_and_large_ones_on_pages(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(7.0),
        "b": torch.arange(600_000).to(torch.int16),
        "c": torch.ones(2, 3, dtype=torch.bool),
        "d": torch.arange(5).to(torch.int8),
    }
    with ExternalData(tmp_path / "data") as data:
        places = {name: data.add(name, constant(tensor, name)) for name, tensor in tensors.items()}
    stored = (tmp_path / "data").read_bytes()
    after = PAGE + 1_200_000
    assert [p.offset for p in places.values()] == [0, PAGE, after, after + LINE] and after % LINE == 0
    for name, tensor in tensors.items():
        place = places[name]
        assert place.file == "data"
        assert stored[place.offset : place.offset + place.length] == tensor.numpy().tobytes()
    assert len(stored) == places["d"].offset + places["d"].length


def test_rows_lie_where_the_whole_does(tmp_path: Path) -> None:
    tensor = torch.arange(24.0).view(6, 4)
    whole = constant(tensor, "w")
    parts = {
        "rows": rows(whole, 2, 5),
        "as torch says it": recorded(record(whole)[-2:]),
        "columns": recorded(record(whole)[:, 1:3]),
    }
    with ExternalData(tmp_path / "data") as data:
        places = {name: data.add(name, part) for name, part in parts.items()}
        first = data.add("w", whole)
    stored = (tmp_path / "data").read_bytes()
    for name, want in {
        "rows": tensor[2:5],
        "as torch says it": tensor[-2:],
        "columns": tensor[:, 1:3].contiguous(),
    }.items():
        place = places[name]
        assert stored[place.offset : place.offset + place.length] == want.numpy().tobytes(), name
    assert places["rows"].offset == first.offset + 2 * 16


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


def test_no_weights_no_file(tmp_path: Path) -> None:
    with ExternalData(tmp_path / "data"):
        pass
    assert not (tmp_path / "data").exists()
