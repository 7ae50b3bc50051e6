"""GGUF headers are parsed completely, and damaged or unsupported ones are errors with a place and a reason."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from llmc.compiler.frontend.gguf_header import GgufHeader, read_header
from llmc.errors import LlmcError

U8, I32, F32, BOOL, STRING, ARRAY, U64 = 0, 5, 6, 7, 8, 9, 10
U32 = 4
TYPE_F32, TYPE_Q4_0, TYPE_IQ1_S, TYPE_UNKNOWN = 0, 2, 19, 999


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, items: list[bytes]) -> bytes:
    return struct.pack("<IQ", kind, len(items)) + b"".join(items)


def tensor(name: str, ggml_dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(ggml_dims)}QIQ", len(ggml_dims), *ggml_dims, kind, offset)


ARCH = entry("general.architecture", STRING, text("llama"))
ENTRIES = [
    ARCH,
    entry("llama.block_count", U32, struct.pack("<I", 30)),
    entry("llama.eps", F32, struct.pack("<f", 0.5)),
    entry("tokenizer.add", BOOL, b"\x01"),
    entry("big", U64, struct.pack("<Q", 1 << 40)),
    entry("tokenizer.tokens", ARRAY, array(STRING, [text("a"), text("é"), text("")])),
    entry("tokenizer.types", ARRAY, array(I32, [struct.pack("<i", -1), struct.pack("<i", 7)])),
]
TENSORS = [tensor("w", (32, 3), TYPE_Q4_0, 0), tensor("n", (5,), TYPE_F32, 64)]
DATA = bytes(64 + 20)


def blob(
    entries: list[bytes] = ENTRIES,
    tensors: list[bytes] = TENSORS,
    data: bytes = DATA,
    magic: bytes = b"GGUF",
    version: bytes = struct.pack("<I", 3),
    alignment: int = 32,
) -> bytes:
    head = magic + version + struct.pack("<QQ", len(tensors), len(entries)) + b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


@pytest.fixture
def parse(tmp_path: Path) -> Any:
    def parse(raw: bytes) -> GgufHeader:
        path = tmp_path / "m.gguf"
        path.write_bytes(raw)
        return read_header(path)

    return parse


def error_of(parse: Any, raw: bytes) -> LlmcError:
    with pytest.raises(LlmcError) as caught:
        parse(raw)
    assert "m.gguf" in caught.value.what
    return caught.value


def test_metadata_has_python_values(parse: Any) -> None:
    header = parse(blob())
    assert header.architecture == "llama"
    assert header.metadata == {
        "general.architecture": "llama",
        "llama.block_count": 30,
        "llama.eps": 0.5,
        "tokenizer.add": True,
        "big": 1 << 40,
        "tokenizer.tokens": ["a", "é", ""],
        "tokenizer.types": [-1, 7],
    }
    assert type(header.metadata["tokenizer.add"]) is bool


def test_tensors_have_torch_shapes_and_absolute_offsets(parse: Any) -> None:
    raw = blob()
    tensors = parse(raw).tensors
    data = len(raw) - len(DATA)
    assert [(t.name, t.shape, t.type.name, t.offset, t.nbytes) for t in tensors.values()] == [
        ("w", (3, 32), "Q4_0", data, 3 * 18),
        ("n", (5,), "F32", data + 64, 20),
    ]


def test_spans_include_the_keys(parse: Any) -> None:
    raw = blob()
    spans = parse(raw).spans
    assert [raw[start:end] for start, end in spans.values()] == ENTRIES


def test_the_alignment_of_the_file_is_used(parse: Any) -> None:
    entries = [*ENTRIES, entry("general.alignment", U32, struct.pack("<I", 128))]
    raw = blob(entries, alignment=128)
    assert parse(raw).tensors["w"].offset == len(raw) - len(DATA)


def test_every_truncated_file_is_an_error(parse: Any) -> None:
    raw = blob()
    for size in range(len(raw)):
        error = error_of(parse, raw[:size])
        assert error.code == "GGUF_CORRUPT", size
        assert error.hint
    assert "tokenizer.tokens" in error_of(parse, raw[: raw.index(b"tokenizer.tokens") + 40]).what
    assert "tensor n occupies bytes" in error_of(parse, raw[:-1]).what


def test_a_damaged_byte_is_an_error_or_harmless(parse: Any) -> None:
    raw = blob()
    for index in range(len(raw) - len(DATA)):
        for value in (0x00, 0xFF, raw[index] ^ 0x80, raw[index] ^ 0x01):
            damaged = bytearray(raw)
            damaged[index] = value
            try:
                parse(bytes(damaged))
            except LlmcError as error:
                assert error.code.startswith("GGUF_")


def test_another_format_is_an_error(parse: Any) -> None:
    error = error_of(parse, blob(magic=b"PK\x03\x04"))
    assert error.code == "GGUF_CORRUPT" and "not a GGUF file" in error.what


@pytest.mark.parametrize(
    ("version", "message"), [(struct.pack("<I", 1), "version 1"), (struct.pack(">I", 3), "big-endian")]
)
def test_another_version_is_an_error(parse: Any, version: bytes, message: str) -> None:
    error = error_of(parse, blob(version=version))
    assert error.code == "GGUF_VERSION" and message in error.what


@pytest.mark.parametrize(("kind", "type_name"), [(TYPE_IQ1_S, "IQ1_S"), (TYPE_UNKNOWN, "number 999")])
def test_an_unsupported_type_is_an_error_that_names_the_tensor(parse: Any, kind: int, type_name: str) -> None:
    error = error_of(parse, blob(tensors=[tensor("blk.0.w", (256,), kind, 0)], data=bytes(1024)))
    assert error.code == "GGUF_TYPE" and "blk.0.w" in error.what and type_name in error.what and "Q4_K" in error.hint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"entries": [*ENTRIES, ARCH]}, "general.architecture occurs again at byte"),
        ({"tensors": [TENSORS[1], TENSORS[1]]}, "tensor n occurs twice"),
        ({"tensors": [tensor("w", (40,), TYPE_Q4_0, 0)]}, "is 40, no multiple of the 32 of a Q4_0 block"),
        ({"tensors": [tensor("w", (1, 1, 1, 1, 1), TYPE_F32, 0)]}, "5 dimensions"),
        ({"entries": [entry("general.alignment", U32, struct.pack("<I", 24))]}, "general.alignment"),
        ({"entries": [entry("x", 13, b"")]}, "value type 13, which"),
        ({"entries": [entry("x", ARRAY, array(ARRAY, [array(U8, [])]))]}, "array of value type 9"),
        ({"entries": [entry("x", STRING, struct.pack("<Q", 2) + b"\xff\xfe")]}, "not UTF-8"),
    ],
)
def test_an_invalid_entry_is_an_error_that_names_it(parse: Any, change: dict[str, Any], message: str) -> None:
    error = error_of(parse, blob(**change))
    assert error.code == "GGUF_CORRUPT" and message in error.what


def test_one_shard_of_several_is_an_error(parse: Any) -> None:
    error = error_of(parse, blob([*ENTRIES, entry("split.count", U32, struct.pack("<I", 3))]))
    assert error.code == "GGUF_SPLIT" and "3 shards" in error.what
    assert parse(blob([*ENTRIES, entry("split.count", U32, struct.pack("<I", 1))])).tensors


def test_a_missing_architecture_is_an_error_when_it_is_used(parse: Any) -> None:
    header = parse(blob(ENTRIES[1:]))
    with pytest.raises(LlmcError, match=r"GGUF_CORRUPT.*general\.architecture"):
        _ = header.architecture


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match=r"MODEL_NOT_FOUND.*none\.gguf"):
        read_header(tmp_path / "none.gguf")
    with pytest.raises(LlmcError, match="MODEL_NOT_FOUND"):
        read_header(tmp_path)
