"""Files beside the graphs: the folder is a model to other tools."""

from __future__ import annotations

import json

import pytest
from compiled import CHAT, GENERATION, artifact, speaking_model
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

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
