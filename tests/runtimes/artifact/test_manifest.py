"""The manifest as bytes: canonical, and strict about what it reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from artifacts import manifest

from llmc import LlmcError
from llmc.runtimes.artifact.manifest import (
    FORMAT,
    CachePart,
    DroppedLayers,
    FileSpec,
    Manifest,
    MaxKlSpec,
    Phase,
    PrunedWeights,
    PruningSpec,
    Verified,
)

WHOLE = replace(manifest(), files={"model.onnx": FileSpec("0" * 64, 5), "a/b": FileSpec("1" * 64, 0)})


def test_there_and_back() -> None:
    data = WHOLE.to_json()
    assert Manifest.from_json(data) == WHOLE
    assert data.endswith(b"}\n") and b'\n  "caches"' in data


def test_all_that_is_optional_there_and_back() -> None:
    layers = DroppedLayers(["h.1"], {"h.0": 0.5, "h.1": 0.25})
    weights = PrunedWeights("2:4", "wanda", 0.5, 3, {"its width is odd": 1})
    assert WHOLE.quantization is not None
    quantization = replace(WHOLE.quantization, max_kl=MaxKlSpec(0.1, 0.05, 1000, 3), exact_inputs=2)
    full = replace(WHOLE, pruning=PruningSpec(layers, weights), quantization=quantization)
    plain = replace(WHOLE, quantization=None)
    for one in (full, plain, replace(full, pruning=PruningSpec())):
        assert Manifest.from_json(one.to_json()) == one
    assert (full.precision, plain.precision) == ("int8", "fp32")


def test_where_it_was_verified_is_left_out_if_that_was_its_engine_here() -> None:
    assert b'"verified"' not in WHOLE.to_json() and Manifest.from_json(WHOLE.to_json()).verified == Verified()
    elsewhere = replace(WHOLE, verified=Verified("graph", "gate"))
    assert Manifest.from_json(elsewhere.to_json()) == elsewhere
    document = json.loads(elsewhere.to_json())
    for wrong in ({"here": "graph"}, {"here": "graph", "on_device": "perhaps"}, "graph", None):
        with pytest.raises(LlmcError, match="ARTIFACT_INVALID"):
            Manifest.from_json(json.dumps(document | {"verified": wrong}).encode())


def test_the_order_of_making_leaves_no_trace() -> None:
    one = replace(WHOLE, phases={"step": Phase(1, 63), "prefill": Phase(64)}, requires={"a": ">=1", "b": ">=2"})
    dicts = ("files", "phases", "requires", "section", "built_with")
    turned = replace(one, **{name: dict(reversed(getattr(one, name).items())) for name in dicts})
    assert list(turned.files) != list(one.files) and list(turned.phases) != list(one.phases)
    assert turned.to_json() == one.to_json()


@pytest.mark.parametrize(("phase", "counts"), [(Phase(1), [1, 2, 63, 64]), (Phase(2, 63), [2, 63]), (Phase(64), [64])])
def test_the_counts_that_a_phase_serves(phase: Phase, counts: list[int]) -> None:
    assert [count for count in (1, 2, 63, 64) if phase.serves(count)] == counts


def test_a_caches_bytes() -> None:
    cache = WHOLE.caches[0]
    assert cache.nbytes == 3 * (64 + 32) * 128 * 4
    assert replace(cache, dtype="bf16").nbytes == cache.nbytes // 2
    rounded = replace(cache, dtype="int8")
    assert rounded.nbytes == 3 * (64 + 32 + 2 * 4) * 128 == replace(rounded, dtype="fp8").nbytes


def test_quantized_caches_round_trip() -> None:
    cache = replace(WHOLE.caches[0], dtype="fp8")
    rounded = replace(WHOLE, caches=[cache])
    assert Manifest.from_json(rounded.to_json()) == rounded
    assert cache.parts == [
        CachePart("key", 64, "fp8"),
        CachePart("value", 32, "fp8"),
        CachePart("key_scale", 1, "fp32"),
        CachePart("value_scale", 1, "fp32"),
    ]
    assert WHOLE.caches[0].parts == [CachePart("key", 64, "fp32"), CachePart("value", 32, "fp32")]
    assert (rounded.cache_codes, WHOLE.cache_codes) == ("fp8", None)


def test_constant_scales_are_no_part_of_a_cache() -> None:
    cache = replace(WHOLE.caches[0], dtype="int8", scales="channel")
    constant = replace(WHOLE, caches=[cache])
    assert Manifest.from_json(constant.to_json()) == constant and constant.cache_codes == "int8"
    assert cache.parts == [CachePart("key", 64, "int8"), CachePart("value", 32, "int8")]
    assert cache.nbytes == 3 * (64 + 32) * 128
    assert b"scales" not in replace(WHOLE, caches=[replace(cache, scales="token")]).to_json()


def test_the_slack_of_a_ring_is_how_far_a_sequence_goes_back() -> None:
    static = WHOLE.caches[0]
    ring = replace(static, kind="ring", length=9)
    assert WHOLE.rollback is None and b"slack" not in replace(WHOLE, caches=[static, ring]).to_json()
    for slacks, rollback in [((0,), 1), ((3,), 4), ((3, 2), 3)]:
        rings = replace(WHOLE, caches=[static, *(replace(ring, slack=slack) for slack in slacks)])
        assert rings.rollback == rollback
        assert Manifest.from_json(rings.to_json()) == rings


@pytest.mark.parametrize(
    "change", [{"slack": 1}, {"kind": "ring", "slack": -1}, {"kind": "ring", "slack": 128}, {"slack": -1}]
)
def test_a_slack_that_no_cache_has_is_refused(change: dict[str, Any]) -> None:
    error = refused(lambda d: d["caches"].append(d["caches"][0] | change))
    assert error.code == "ARTIFACT_INVALID" and "caches[1] has an impossible slack" in error.what


def test_scales_without_codes_are_refused() -> None:
    error = refused(lambda d: d["caches"].append(d["caches"][0] | {"scales": "channel"}))
    assert error.code == "ARTIFACT_INVALID" and "caches[1] has scales, but no codes" in error.what


def refused(change: Callable[[dict[str, Any]], object]) -> LlmcError:
    document = json.loads(WHOLE.to_json())
    change(document)
    with pytest.raises(LlmcError) as caught:
        Manifest.from_json(json.dumps(document).encode())
    return caught.value


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.pop("phases"), "the manifest lacks phases"),
        (lambda d: d.update(extra=1), "the manifest has unknown keys: extra"),
        (lambda d: d["caches"][0].pop("kind"), "the manifest.caches[0] lacks kind"),
        (
            lambda d: d["caches"][0].update(kind="round"),
            "the manifest.caches[0].kind is 'round', not 'static' or 'ring'",
        ),
        (lambda d: d["model"].update(license="x"), "the manifest.model has unknown keys: license"),
        (lambda d: d.update(max_seq_len="128"), "the manifest.max_seq_len is '128', not a whole number"),
        (lambda d: d.update(max_seq_len=True), "the manifest.max_seq_len is True"),
        (lambda d: d["files"].update(x=[]), "the manifest.files['x'] is [], not an object"),
        (lambda d: d["quantization"]["weights"].update(int4="3"), "the manifest.quantization.weights['int4'] is '3'"),
        (lambda d: d.update(pruning={"layers": None}), "the manifest.pruning lacks weights"),
        (lambda d: d.update(section=[]), "the manifest.section is [], not dict"),
        (lambda d: d.pop("format"), "it names no format"),
        (lambda d: d.update(format=True), "it names no format"),
    ],
)
def test_what_does_not_fit_is_named(change: Callable[[dict[str, Any]], object], said: str) -> None:
    error = refused(change)
    assert error.code == "ARTIFACT_INVALID"
    assert said in error.what


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.update(phases={}), "it has no phase 'step' that serves single tokens"),
        (lambda d: d["phases"].update(other=d["phases"].pop("step")), "it has no phase 'step'"),
        (lambda d: d["phases"]["step"].update(min_tokens=2), "it has no phase 'step' that serves single tokens"),
        (lambda d: d["phases"]["step"].update(min_tokens=0), "phase 'step' serves no number of tokens"),
        (lambda d: d["phases"]["step"].update(max_tokens=0), "phase 'step' serves no number of tokens"),
        (lambda d: d["phases"].update(more={"min_tokens": 64, "max_tokens": 63}), "phase 'more' serves no number"),
        (lambda d: d["phases"]["step"].update(max_tokens=63), "no phase serves 64 tokens"),
        (lambda d: d["phases"]["step"].update(max_tokens=1.5), "the manifest.phases['step'].max_tokens is 1.5"),
        (lambda d: d["phases"]["step"].pop("max_tokens"), "the manifest.phases['step'] lacks max_tokens"),
    ],
)
def test_phases_that_serve_nothing_are_refused(change: Callable[[dict[str, Any]], object], said: str) -> None:
    error = refused(change)
    assert error.code == "ARTIFACT_INVALID"
    assert said in error.what


@pytest.mark.parametrize("field", ["heads", "key_dim", "value_dim", "length"])
@pytest.mark.parametrize("size", [0, -1])
def test_a_cache_without_room_is_refused(field: str, size: int) -> None:
    error = refused(lambda d: d["caches"].append(d["caches"][0] | {field: size}))
    assert error.code == "ARTIFACT_INVALID"
    assert "caches[1] has an impossible size" in error.what


def test_a_cache_longer_than_a_sequence_is_refused() -> None:
    error = refused(lambda d: d["caches"][0].update(length=129))
    assert error.code == "ARTIFACT_INVALID" and "caches[0] has an impossible size" in error.what
    assert refused(lambda d: d.update(max_seq_len=127)).what == error.what


def test_caches_of_more_than_a_terabyte_are_refused() -> None:
    bytes_of_one = 3 * (64 + 32) * 4
    for change in (
        lambda d: (d.update(max_seq_len=1 << 40), d["caches"][0].update(length=(1 << 40) // bytes_of_one + 1)),
        lambda d: d["caches"][0].update(key_dim=1 << 40),
        lambda d: d["caches"].extend([d["caches"][0] | {"heads": 1 << 22}] * 8),
    ):
        error = refused(change)
        assert error.code == "ARTIFACT_INVALID"
        assert "its caches would take more than a terabyte for one sequence" in error.what
    length = (1 << 40) // bytes_of_one
    largest = replace(WHOLE, max_seq_len=length, caches=[replace(WHOLE.caches[0], length=length)])
    assert Manifest.from_json(largest.to_json()) == largest


@pytest.mark.parametrize("target", ["", "../ort", "or/t", "or.t", "or t", "1ort", "ort\n", "ort\0"])
def test_a_target_that_is_no_name_is_refused(target: str) -> None:
    error = refused(lambda d: d.update(target=target))
    assert error.code == "ARTIFACT_INVALID"
    assert f"the target {target!r} is not a name" in error.what


@pytest.mark.parametrize("size", [0, -5])
def test_sizes_of_a_model_are_1_or_more(size: int) -> None:
    for change in (lambda d: d.update(max_seq_len=size), lambda d: d["model"].update(vocab_size=size)):
        error = refused(change)
        assert error.code == "ARTIFACT_INVALID"
        assert "vocab_size and max_seq_len must be 1 or more" in error.what


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "a//b", "./a", ".", "", "a\\b", "C:/x", "a\0b"])
def test_a_file_name_stays_inside(name: str) -> None:
    error = refused(lambda d: d["files"].update({name: d["files"]["a/b"]}))
    assert error.code == "ARTIFACT_INVALID"
    assert "not a plain relative one" in error.what


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b'"format"', b"[" * 100_000])
def test_what_is_no_manifest_at_all(data: bytes) -> None:
    with pytest.raises(LlmcError) as caught:
        Manifest.from_json(data)
    assert caught.value.code == "ARTIFACT_INVALID"


def test_a_newer_format_is_said_before_its_keys() -> None:
    error = refused(lambda d: d.update(format=FORMAT + 1, keys_of_the_future=1))
    assert error.code == "ARTIFACT_NEWER"
    assert f"format {FORMAT + 1}" in error.what
    assert "pip install --upgrade llmc" in error.hint


# A manifest as llmc 0.1 wrote it.
FORMAT_1 = {
    "format": 1,
    "target": "ort",
    "model": {
        "name": "tiny", "type": "llama", "identity": "one", "vocab_size": 100, "layers": 1, "parameters": 1234
    },
    "max_seq_len": 128,
    "graphs": {"step": {"file": "model.onnx", "min_rows": 1, "max_rows": None, "derived": [], "stored": []}},
    "caches": [
        {
            "key": "past_key_values.0.key", "value": "past_key_values.0.value", "present_key": "present.0.key",
            "present_value": "present.0.value", "kind": "static", "heads": 3, "key_dim": 64, "value_dim": 32,
            "length": 128, "dtype": "fp32", "scales": None,
        }
    ],
    "quantization": None,
    "pruning": None,
    "built_with": {"llmc": "0.1.0"},
    "requires": {"numpy": ">=1.26"},
    "files": {"model.onnx": {"sha256": "0" * 64, "bytes": 5}},
}  # fmt: skip


def test_an_older_format_is_said_before_its_keys() -> None:
    for document in (FORMAT_1, {"format": 1}, {"format": 0}, {"format": -3}):
        with pytest.raises(LlmcError) as caught:
            Manifest.from_json(json.dumps(document).encode())
        error = caught.value
        assert error.code == "ARTIFACT_OLDER"
        assert f"The artifact has format {document['format']}" in error.what
        assert f"this llmc reads format {FORMAT}" in error.what
        assert error.hint == "Compile it again with this llmc: llmc compile MODEL -o DIR"
        assert "\n" not in str(error)
