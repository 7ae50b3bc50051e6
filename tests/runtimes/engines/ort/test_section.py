"""The section of target "ort": names, offsets and sizes that lead out of the artifact's files are refused unread."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from artifacts import manifest

from llmc import LlmcError
from llmc.runtimes.artifact.manifest import FileSpec, Manifest, Phase
from llmc.runtimes.engines.ort import graph as graph_module
from llmc.runtimes.engines.ort.engine import OrtEngine
from llmc.runtimes.engines.ort.section import DerivedSpec, GraphFile, OrtSection, StoredSpec, read_section, stored_bytes

SIZES = {"model.onnx": 100, "prefill.onnx": 100, "data": 1000}
# 4 x 8 codes, two in each byte, in two groups.
INT4 = {
    "name": "w", "scheme": "int4", "rows": 4, "columns": 8, "group_size": 4, "file": "data",
    "codes_offset": 984, "zeros_offset": 996, "multiples_offset": 992, "offset": 4096,
}  # fmt: skip
INT8 = INT4 | {"name": "v", "scheme": "int8", "group_size": 8, "codes_offset": 968, "zeros_offset": None,
               "multiples_offset": None, "offset": 0}  # fmt: skip
STORED = {"name": "norm", "dtype": "float32", "shape": [5, 50], "file": "data", "offset": 0}


def document() -> dict[str, Any]:
    """Return a section in which every part ends exactly with the file."""
    prefill = {"file": "prefill.onnx", "derived": [INT4, INT8], "stored": [STORED], "batch_tokens": 6}
    step = {"file": "model.onnx", "derived": [], "stored": []}
    return {"graphs": {"step": step, "prefill": prefill}}


def manifest_with(change: Callable[[dict[str, Any]], object]) -> Manifest:
    """Return a manifest whose section has a change, made to a copy."""
    section = json.loads(json.dumps(document()))
    change(section)
    files = {name: FileSpec("0" * 64, size) for name, size in SIZES.items()}
    return replace(manifest(), phases={"step": Phase(1, 63), "prefill": Phase(64)}, section=section, files=files)


def test_a_section_that_fits_its_files() -> None:
    section = read_section(manifest_with(lambda d: None))
    assert section == OrtSection(
        {
            "step": GraphFile("model.onnx"),
            "prefill": GraphFile("prefill.onnx", [DerivedSpec(**INT4), DerivedSpec(**INT8)], [StoredSpec(**STORED)], 6),
        }
    )


@pytest.mark.parametrize(
    ("dtype", "shape", "size"),
    [
        ("float32", [3, 5], 60),
        ("float64", [3, 5], 120),
        ("int64", [], 8),
        ("float16", [2, 2, 2], 16),
        ("float8_e4m3fn", [7], 7),
        ("bool", [7, 0], 0),
    ],
)
def test_bytes_of_a_stored_weight(dtype: str, shape: list[int], size: int) -> None:
    assert stored_bytes(StoredSpec("w", dtype, shape, "data", 0)) == size


Change = Callable[[dict[str, Any]], object]


def graph(**changes: Any) -> Change:
    return lambda d: d["graphs"]["prefill"].update(changes)


def int4(**changes: Any) -> Change:
    return lambda d: d["graphs"]["prefill"]["derived"][0].update(changes)


def int8(**changes: Any) -> Change:
    return lambda d: d["graphs"]["prefill"]["derived"][1].update(changes)


def stored(**changes: Any) -> Change:
    return lambda d: d["graphs"]["prefill"]["stored"][0].update(changes)


def refused(change: Change, monkeypatch: pytest.MonkeyPatch) -> LlmcError:
    """Return the refusal of a section, which an engine gives before it opens any file."""
    broken = manifest_with(change)
    with pytest.raises(LlmcError) as caught:
        read_section(broken)
    assert caught.value.code == "ARTIFACT_INVALID" and "\n" not in str(caught.value)
    monkeypatch.setattr(graph_module, "open_session", lambda *a: pytest.fail("a graph was opened"))
    with pytest.raises(LlmcError) as again:
        OrtEngine(Path("/no/such/folder"), broken, threads=1)
    assert str(again.value) == str(caught.value)
    return caught.value


NAMES = ["other", "../data", "/etc/passwd", "", "data/", "./data"]


@pytest.mark.parametrize("name", [*NAMES, "manifest.json"])
def test_a_file_that_is_not_among_the_artifacts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"graph 'prefill' is in {name!r}, which" in refused(graph(file=name), monkeypatch).what
    assert f"'w' is not within the file {name!r}" in refused(int4(file=name), monkeypatch).what
    assert f"'v' is not within the file {name!r}" in refused(int8(file=name), monkeypatch).what
    assert f"'norm' is not within the file {name!r}" in refused(stored(file=name), monkeypatch).what


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (stored(offset=-1), "norm"),
        (stored(offset=1), "norm"),
        (stored(offset=1 << 70), "norm"),
        (stored(shape=[5, 51]), "norm"),
        (stored(shape=[1 << 40, 1 << 40]), "norm"),
        (stored(dtype="float64"), "norm"),
        (int4(codes_offset=-1), "w"),
        (int4(codes_offset=985), "w"),
        (int4(zeros_offset=-1), "w"),
        (int4(zeros_offset=997), "w"),
        (int4(multiples_offset=-1), "w"),
        (int4(multiples_offset=993), "w"),
        (int4(rows=5), "w"),
        (int4(columns=12), "w"),
        (int4(rows=1 << 60), "w"),
        (int8(codes_offset=-1), "v"),
        (int8(codes_offset=969), "v"),
        (int8(rows=5), "v"),
        (int8(columns=16), "v"),
    ],
)
def test_what_is_not_within_its_file(change: Change, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"{name!r} is not within the file 'data'" in refused(change, monkeypatch).what


@pytest.mark.parametrize(
    "changes",
    [
        {"scheme": "nf4"},
        {"scheme": "fp8"},
        {"scheme": ""},
        {"rows": 0},
        {"rows": -4},
        {"columns": 0},
        {"columns": -8},
        {"group_size": 0},
        {"group_size": -4},
        {"group_size": 3},
        {"group_size": 16},
        {"offset": -1},
    ],
)
def test_a_derived_matrix_of_an_impossible_form(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for change, name in ((int4(**changes), "w"), (int8(**changes), "v")):
        assert f"the derived matrix {name!r} has an impossible form" in refused(change, monkeypatch).what


def test_a_derived_matrix_far_away_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for offset in (1 << 20, 1 << 70):
        assert "the derived matrix 'w' is out of place" in refused(int4(offset=offset), monkeypatch).what


def test_caches_in_a_type_that_the_engine_does_not_know_are_refused() -> None:
    given = manifest_with(lambda d: None)
    with pytest.raises(LlmcError, match="ARTIFACT_INVALID") as caught:
        read_section(replace(given, caches=[replace(given.caches[0], dtype="bf16")]))
    assert "keeps no caches in bf16" in caught.value.what


def test_caches_of_another_device_are_refused() -> None:
    given = manifest_with(lambda d: d.update(device="cuda"))
    half = [replace(given.caches[0], dtype="bf16")]
    assert read_section(replace(given, caches=half)).device == "cuda"
    with pytest.raises(LlmcError, match="keeps no caches in fp32 on a GPU"):
        read_section(given)
    with pytest.raises(LlmcError, match="keeps no ring caches on a GPU"):
        read_section(replace(given, caches=[replace(half[0], kind="ring")]))


def test_a_group_of_half_a_byte_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two 4-bit codes share a byte, so a group has an even number of them."""
    for group, columns in ((1, 8), (3, 6)):
        change = int4(group_size=group, columns=columns, codes_offset=0, zeros_offset=None, multiples_offset=None)
        assert "the derived matrix 'w' has an impossible form" in refused(change, monkeypatch).what


@pytest.mark.parametrize("dtype", ["float", "object", "U10", "bfloat16", "", "FLOAT32", "float32 "])
def test_a_stored_weight_of_an_unknown_dtype(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "the weight 'norm' has no known type or size" in refused(stored(dtype=dtype), monkeypatch).what


@pytest.mark.parametrize("shape", [[-1], [5, -50], [-5, -50]])
def test_a_stored_weight_of_an_impossible_size(shape: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "the weight 'norm' has no known type or size" in refused(stored(shape=shape), monkeypatch).what


def test_graphs_and_phases_have_the_same_names(monkeypatch: pytest.MonkeyPatch) -> None:
    changes: list[Change] = [
        lambda d: d["graphs"].pop("prefill"),
        lambda d: d["graphs"].update(more=d["graphs"]["step"]),
        lambda d: d["graphs"].update(many=d["graphs"].pop("prefill")),
        lambda d: d["graphs"].clear(),
    ]
    for change in changes:
        assert "its phases and its graphs have different names" in refused(change, monkeypatch).what


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.clear(), "section lacks graphs"),
        (lambda d: d.update(providers=[]), "section has unknown keys: providers"),
        (lambda d: d.update(graphs=[]), "section.graphs is [], not dict"),
        (graph(file=None), "section.graphs['prefill'].file is None, not text"),
        (graph(derived={}), "section.graphs['prefill'].derived is {}, not list"),
        (lambda d: d["graphs"]["step"].pop("stored"), "section.graphs['step'] lacks stored"),
        (int4(offset=1.5), "derived[0].offset is 1.5, not a whole number"),
        (int4(codes_offset="0"), "derived[0].codes_offset is '0', not a whole number"),
        (int4(codes_offset=None), "derived[0].codes_offset is None, not a whole number"),
        (int8(rows=True), "derived[1].rows is True, not a whole number"),
        (int8(name=3), "derived[1].name is 3, not text"),
        (stored(shape=5), "stored[0].shape is 5, not list"),
        (stored(shape=[5.0]), "stored[0].shape[0] is 5.0, not a whole number"),
        (stored(dtype=1), "stored[0].dtype is 1, not text"),
        (stored(length=4), "stored[0] has unknown keys: length"),
    ],
)
def test_keys_and_types(change: Change, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert said in refused(change, monkeypatch).what
