"""The manifest of what was compiled."""

from __future__ import annotations

from compiled import artifact
from zoo.tiny import tiny_model

from llmc.runtimes.artifact.open import open_artifact


def test_the_manifest() -> None:
    manifest = open_artifact(artifact("speaking", quantize="int4"))
    model = manifest.model
    assert (model.type, model.vocab_size, model.layers) == ("llama", 96, 2)
    assert model.parameters == sum(p.numel() for p in tiny_model("llama").parameters())
    assert model.identity.startswith("sha256:") and "/" not in model.name
    assert (manifest.target, manifest.max_seq_len, sorted(manifest.phases)) == ("ort", 128, ["prefill", "step"])
    assert manifest.quantization is not None
    spec = manifest.quantization
    assert (spec.scheme, spec.precision, spec.algorithm, spec.why) == ("int4", "int4", "gptq", "")
    assert sum(spec.weights.values()) == 10  # four a layer, the embedding and the head
    assert manifest.built_with.keys() == {"llmc", "onnx", "torch", "transformers"}
    assert manifest.requires == {"onnxruntime": ">=1.30,<2"}
    assert len(manifest.caches) == 2
    rings = open_artifact(artifact("gemma3_text")).caches
    assert {(c.kind, c.length, c.slack) for c in rings} == {("ring", 6, 0), ("static", 128, 0)}
    longer = open_artifact(artifact("gemma3_text", spec_tokens=3)).caches
    assert {(c.kind, c.length, c.slack) for c in longer} == {("ring", 9, 3), ("static", 128, 0)}
