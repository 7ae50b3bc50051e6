"""The manifest as bytes: canonical, and strict about what it reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from artifacts import manifest

from llmc import LlmcError
from llmc.runtimes.artifact.manifest import FORMAT, FileSpec, Manifest, ScalesSpec

WHOLE = replace(manifest(), files={"model.onnx": FileSpec("0" * 64, 5), "a/b": FileSpec("1" * 64, 0)})


def test_there_and_back() -> None:
    data = WHOLE.to_json()
    assert Manifest.from_json(data) == WHOLE
    assert data.endswith(b"}\n") and b'\n  "caches"' in data


def test_the_order_of_making_leaves_no_trace() -> None:
    turned = replace(WHOLE, files=dict(reversed(WHOLE.files.items())), model=dict(reversed(WHOLE.model.items())))
    assert turned.to_json() == WHOLE.to_json()


def test_a_caches_bytes() -> None:
    cache = WHOLE.caches[0]
    assert cache.nbytes == 3 * (64 + 32) * 128 * 4
    assert replace(cache, dtype="bf16").nbytes == cache.nbytes // 2
    rounded = replace(cache, dtype="int8", scales=ScalesSpec("ks", "vs", "pks", "pvs"))
    assert rounded.nbytes == 3 * (64 + 32 + 2 * 4) * 128 == replace(rounded, dtype="fp8").nbytes


def test_rounded_caches_there_and_back() -> None:
    cache = replace(WHOLE.caches[0], dtype="fp8", scales=ScalesSpec("ks", "vs", "pks", "pvs"))
    rounded = replace(WHOLE, caches=[cache])
    assert Manifest.from_json(rounded.to_json()) == rounded
    assert [part[:3] for part in cache.tensors] == [
        ("past_key_values.0.key", "present.0.key", 64),
        ("past_key_values.0.value", "present.0.value", 32),
        ("ks", "pks", 1),
        ("vs", "pvs", 1),
    ]
    assert [part.dtype for part in cache.tensors] == ["fp8", "fp8", "fp32", "fp32"]


def refused(change: Callable[[dict[str, Any]], object]) -> LlmcError:
    document = json.loads(WHOLE.to_json())
    change(document)
    with pytest.raises(LlmcError) as caught:
        Manifest.from_json(json.dumps(document).encode())
    return caught.value


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.pop("graphs"), "the manifest lacks graphs"),
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
        (lambda d: d["graphs"]["step"].update(file="y"), "graph 'step' is in 'y', which is not among the files"),
        (lambda d: d["graphs"].update(other=d["graphs"].pop("step")), "it has no graph 'step'"),
        (lambda d: d.pop("format"), "it names no format"),
    ],
)
def test_what_does_not_fit_is_named(change: Callable[[dict[str, Any]], object], said: str) -> None:
    error = refused(change)
    assert error.code == "ARTIFACT_INVALID"
    assert said in error.what


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
