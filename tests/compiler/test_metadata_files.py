"""What stands beside the graphs: the folder is a model to other tools, and says what it was made from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compiled import CHAT, GENERATION, artifact, speaking_model
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from zoo.tiny import tiny_model

from llmc.compiler.frontend.sources import find_source
from llmc.compiler.metadata_files import identity, write_json
from llmc.runtimes.artifact.open import open_artifact
from llmc.runtimes.generate.tokenizer import Tokenizer

GRAPHS = {"model.onnx", "model.onnx.data", "manifest.json"}
GATE = {"reference.npz", "verify.json"}
CONFIGS = {"config.json", "generation_config.json"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


@pytest.mark.parametrize(
    ("model", "options", "files"),
    [
        ("speaking", {}, GRAPHS | GATE | CONFIGS | TOKENIZER | {"genai_config.json"}),
        ("speaking", {"quantize": "int4"}, GRAPHS | GATE | CONFIGS | TOKENIZER | {"genai_config.json", "prefill.onnx"}),
        ("gemma3_text", {}, GRAPHS | GATE | CONFIGS),  # a ring, which onnxruntime-genai can't drive
        ("speaking", {"kv_cache_dtype": "int8"}, GRAPHS | GATE | CONFIGS | TOKENIZER),  # nor scales of caches
        ("gemma3_text", {"kv_cache": "static", "ops": "standard"}, GRAPHS | GATE | CONFIGS | {"genai_config.json"}),
    ],
)
def test_which_files(model: str, options: dict[str, str], files: set[str]) -> None:
    folder = artifact(model, **options)
    assert {path.name for path in folder.iterdir()} == files
    assert set(open_artifact(folder).files) == files - {"manifest.json"}


def test_other_tools_read_the_folder() -> None:
    folder = artifact("speaking")
    configs = [AutoConfig.from_pretrained(place).to_diff_dict() for place in (folder, speaking_model())]
    assert configs[0] == configs[1]
    assert str(speaking_model()) not in "".join(path.read_text() for path in folder.glob("*.json"))
    theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer(folder)
    text = "To be, or not to be."
    given = AutoTokenizer.from_pretrained(speaking_model())
    assert theirs(text)["input_ids"] == ours.encode(text) == given(text)["input_ids"]
    assert ours.decode(ours.encode(text)).replace(" ", "") == text.replace(" ", "")
    assert ours.chat([{"role": "user", "content": "x"}]) == "u:x;" and theirs.chat_template == CHAT
    assert list(ours.eos_ids) == [2] == GenerationConfig.from_pretrained(folder).eos_token_id


def test_a_generation_config_is_taken_along_as_it_is() -> None:
    folder = artifact("speaking")
    assert (folder / "generation_config.json").read_text() == GENERATION
    said = json.loads((folder / "genai_config.json").read_text())["model"]
    assert (said["bos_token_id"], said["eos_token_id"], said["pad_token_id"]) == (1, [2], 0)
    # One that has none gets what its config says.
    assert GenerationConfig.from_pretrained(artifact("gemma3_text")).eos_token_id == 2


def test_the_manifest() -> None:
    manifest = open_artifact(artifact("speaking", quantize="int4"))
    model = manifest.model
    assert (model["type"], model["vocab_size"], model["layers"]) == ("llama", 96, 2)
    assert model["parameters"] == sum(p.numel() for p in tiny_model("llama").parameters())
    assert model["identity"].startswith("sha256:") and "/" not in model["name"]
    assert (manifest.target, manifest.max_seq_len, list(manifest.graphs)) == ("ort", 128, ["prefill", "step"])
    assert manifest.quantization is not None
    said = {key: manifest.quantization[key] for key in ("scheme", "precision", "algorithm", "why")}
    assert said == {"scheme": "int4", "precision": "int4", "algorithm": "gptq", "why": ""}
    assert sum(manifest.quantization["weights"].values()) == 10  # four a layer, the embedding and the head
    assert manifest.built_with.keys() == {"llmc", "onnx", "torch", "transformers"}
    assert manifest.requires == {"onnxruntime": ">=1.30,<2"}
    assert len(manifest.caches) == 2
    parts = {spec.name.split("layers_0_")[-1] for spec in manifest.graphs["prefill"].derived if "layers_0" in spec.name}
    assert {part.split("_weight")[0] for part in parts} >= {"self_attn_o_proj", "mlp_down_proj"}
    rings = open_artifact(artifact("gemma3_text")).caches
    assert {(c.kind, c.length) for c in rings} == {("ring", 6), ("static", 128)}


def test_identity_is_the_content(tmp_path: Path) -> None:
    def of(model: object) -> str:
        source = find_source(model)  # type: ignore[arg-type]
        return identity(source, source.build(torch.float32))

    model = tiny_model("llama")
    assert of(model) == of(tiny_model("llama"))
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "other")
    assert of(tmp_path / "one") == of(tmp_path / "other")
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    assert of(model) != of(tiny_model("llama"))
    model.save_pretrained(tmp_path / "other")
    assert of(tmp_path / "one") != of(tmp_path / "other")


def test_a_snapshot_of_the_hub_is_its_commit(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    tiny_model("llama").save_pretrained(tmp_path / "snapshots" / commit)
    source = find_source(tmp_path / "snapshots" / commit)
    assert identity(source, source.build(torch.float32)) == f"commit:{commit}"


def test_json_is_canonical(tmp_path: Path) -> None:
    write_json(tmp_path / "x", {"b": "ü", "a": [1]})
    assert (tmp_path / "x").read_text() == '{\n  "a": [\n    1\n  ],\n  "b": "ü"\n}\n'
