"""A small artifact for tests: a manifest and files that no engine can run."""

from __future__ import annotations

from pathlib import Path

from llmc.runtimes.artifact.manifest import FORMAT, CacheSpec, Manifest, ModelSpec, Phase, QuantizationSpec
from llmc.runtimes.artifact.write import ArtifactWriter

FILES = {"model.onnx": b"graph", "model.onnx.data": b"weights" * 1000, "extra/tokenizer.json": b"{}", "empty": b""}


def manifest(identity: str = "one", **changes: object) -> Manifest:
    """Return a manifest without files, with `changes` to its fields."""
    cache = CacheSpec(kind="static", heads=3, key_dim=64, value_dim=32, length=128, dtype="fp32")
    fields: dict[str, object] = {
        "format": FORMAT,
        "target": "ort",
        "model": ModelSpec("tiny", "llama", identity, vocab_size=100, layers=1, parameters=1234),
        "max_seq_len": 128,
        "phases": {"step": Phase(1)},
        "caches": [cache],
        "quantization": QuantizationSpec(
            "int8", "int8", "rtn", "no tokenizer", weights={"int8 by channel": 12, "as it was": 1}
        ),
        "pruning": None,
        "section": {"graphs": {"step": {"file": "model.onnx", "derived": [], "stored": []}}},
        "built_with": {"llmc": "0.1.0"},
        "requires": {"numpy": ">=1.26"},
    }
    return Manifest(**(fields | changes))  # type: ignore[arg-type]


class OldLibrary:
    """Replaces `ctypes.CDLL` by a C library without `renameat2`, the atomic exchange."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...


def fill(folder: Path, salt: str = "") -> None:
    """Write the files; with another `salt` their content is different."""
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content + salt.encode())


def write(final: Path, identity: str = "one", **changes: object) -> Manifest:
    """Write a complete artifact to `final`."""
    with ArtifactWriter(final) as writer:
        fill(writer.folder, identity)
        return writer.commit(manifest(identity, **changes))
