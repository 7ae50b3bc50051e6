"""Modules, folders, files and hub ids as models, and refusals of anything else."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from check_pass import VOCAB
from torch import Tensor, nn
from zoo.tiny import tiny_model

import llmc
from llmc.compiler.frontend.sources import ModelSource, find_source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path)
    return tmp_path


def with_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def refusal(call: Callable[[], object]) -> llmc.LlmcError:
    with pytest.raises(llmc.LlmcError) as caught:
        call()
    error = caught.value
    assert "\n" not in str(error), "an error is one paragraph"
    assert error.what.endswith((".", "]")) or ": " in error.what
    assert error.hint.endswith(".")
    return error


def refused(model: Any) -> llmc.LlmcError:
    return refusal(lambda: find_source(model).build(torch.float32))


# Modules ------------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, 8)
        self.head = nn.Linear(8, VOCAB, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.arange(8.0), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens) + self.table.to(self.embed.weight.dtype))


def test_a_module_is_its_own_source() -> None:
    model = Model()
    source = find_source(model)
    assert (source.name, source.config) == ("Model", None)
    assert source.build(torch.float32) is model
    weights = source.weights(model)
    assert set(weights) == {"embed.weight", "head.weight"}
    assert weights["embed.weight"].evaluate().data_ptr() == model.embed.weight.data_ptr()
    assert weights["embed.weight"].key == weights["head.weight"].key
    assert refusal(source.tokenizer).code == "TOKENIZER_MISSING"


def test_a_module_in_another_dtype_is_a_copy_on_meta() -> None:
    model = Model()
    built = find_source(model).build(torch.bfloat16)
    assert built.embed.weight.is_meta and built.embed.weight.dtype == torch.bfloat16
    assert built.head.weight is built.embed.weight
    assert torch.equal(built.table, model.table)
    assert model.embed.weight.dtype == torch.float32 and not model.embed.weight.is_meta


def test_buffers_have_the_dtype_that_transformers_gives_them() -> None:
    built = find_source(tiny_model("xglm")).build(torch.bfloat16)
    assert built.model.embed_positions.weights.dtype == torch.bfloat16
    built = find_source(tiny_model("llama")).build(torch.bfloat16)
    assert built.model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_transformers_model_has_its_config() -> None:
    model = tiny_model("llama")
    assert find_source(model).config is model.config


# Folders ------------------------------------------------------------------------------------------------------------


def test_a_folder_has_a_name_a_config_and_a_structure_on_meta(folder: Path) -> None:
    for path in (str(folder), folder):
        source = find_source(path)
        assert isinstance(source, ModelSource) and source.name == str(folder)
        assert source.config is not None and source.config.model_type == "llama"
        built = source.build(torch.bfloat16)
        assert all(p.is_meta and p.dtype == torch.bfloat16 for p in built.parameters())
        assert not built.training


def test_a_tilde_is_expanded_to_the_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert find_source(f"~/{folder.name}").config is not None


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./nothing", "nothing", "a/b/c", "~/no/such", "no.gguf", "no/x.gguf"]
)
def test_a_model_that_does_not_exist(name: str) -> None:
    error = refused(name)
    assert error.code == "MODEL_NOT_FOUND" and name in error.what


def test_a_folder_without_a_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    error = refused(folder)
    assert error.code == "MODEL_NOT_FOUND" and "config.json" in error.what


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "model_type: llama",
        "[]",
        "3",
        "null",
        "{}",
        '{"hidden_size": 8}',
        '{"model_type": null}',
        '{"model_type": ["llama"]}',
    ],
)
def test_an_invalid_config_file(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    error = refused(folder)
    assert error.code == "MODEL_CONFIG_INVALID" and str(folder / "config.json") in error.what


def test_a_config_that_is_not_text(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe\x00{}")
    assert refused(folder).code == "MODEL_CONFIG_INVALID"


@pytest.mark.parametrize("model_type", ["nonesuch", ""])
def test_a_model_type_that_transformers_does_not_support(folder: Path, model_type: str) -> None:
    error = refused(with_config(folder, model_type=model_type))
    assert error.code == "MODEL_TYPE_UNKNOWN" and repr(model_type) in error.what


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "wide"},
        {"hidden_size": -8},
        {"num_attention_heads": 0, "head_dim": None},
        {"hidden_act": "nonesuch"},
        {"vocab_size": None},
        {"rope_parameters": {"rope_type": "nonesuch"}},
    ],
)
def test_a_config_with_invalid_values(folder: Path, changes: dict[str, Any]) -> None:
    assert refused(with_config(folder, **changes)).code == "MODEL_CONFIG_INVALID"


def test_a_model_that_is_not_a_causal_language_model(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))
    error = refused(folder)
    assert error.code == "NOT_CAUSAL_LM" and "T5Config" in error.what


REMOTE = {"model_type": "homemade", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}


def test_a_models_own_code_does_not_run_without_trust(folder: Path) -> None:
    (folder / "code.py").write_text("raise SystemExit('it ran')")
    error = refused(with_config(folder, **REMOTE))
    assert error.code == "REMOTE_CODE" and "trust_remote_code" in error.hint


def test_own_code_for_a_type_that_transformers_supports_does_not_run(folder: Path) -> None:
    (folder / "code.py").write_text("raise SystemExit('it ran')")
    find_source(with_config(folder, auto_map=REMOTE["auto_map"])).build(torch.float32)


def test_an_unsupported_quantization(folder: Path) -> None:
    error = refused(with_config(folder, quantization_config={"quant_method": "abacus"}))
    assert error.code == "CHECKPOINT_QUANTIZED" and "abacus" in error.what


def test_trusted_code_runs(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    (folder / "code.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig):\n    model_type = 'homemade'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    built = find_source(with_config(folder, **REMOTE), trust_remote_code=True).build(torch.float32)
    assert type(built).__name__ == "Model" and type(built.config).__name__ == "Config"


# Tokenizers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "qwen3"])
def test_a_folder_without_a_tokenizer(tmp_path: Path, model_type: str) -> None:
    tiny_model(model_type).save_pretrained(tmp_path)
    assert refusal(find_source(tmp_path).tokenizer).code == "TOKENIZER_MISSING"


@pytest.mark.parametrize("text", ["", "{", "{}", '{"model": {"type": "BPE", "vocab": 3}}'])
def test_an_invalid_tokenizer(folder: Path, text: str) -> None:
    (folder / "tokenizer.json").write_text(text)
    assert refusal(find_source(folder).tokenizer).code == "TOKENIZER_MISSING"


def test_a_tokenizer_is_read(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"the": 0, "sea": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert find_source(folder).tokenizer()("the sea").input_ids == [0, 1]


# Files and the hub --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_a_pickle(tmp_path: Path, name: str) -> None:
    torch.save({}, tmp_path / name)
    assert refused(tmp_path / name).code == "WEIGHTS_PICKLE"


@pytest.mark.parametrize("raw", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + 8 * b"\x01", b"PK\x03\x04 a zip" * 10])
def test_a_truncated_or_invalid_gguf_file(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(raw)
    error = refused(path)
    assert error.code == "GGUF_CORRUPT" and str(path) in error.what


def test_a_hub_id_without_access_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    error = refused("some-org/some-model")
    assert error.code == "MODEL_NOT_FOUND" and "'some-org/some-model'" in error.what and "hub" in error.what


@pytest.mark.parametrize("trusted", [False, True])
def test_only_needed_files_are_downloaded_from_the_hub(
    folder: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool
) -> None:
    patterns: list[str] = []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        assert name == "some-org/some-model"
        patterns.extend(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert find_source("some-org/some-model", trust_remote_code=trusted).name == "some-org/some-model"
    files = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "chat_template.jinja", "merges.txt"]
    files += ["pytorch_model.bin", "model.gguf", "code.py", "flax_model.msgpack", "README.md"]
    downloaded = [name for name in files if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    assert downloaded == files[:5] + ["code.py"] * trusted
