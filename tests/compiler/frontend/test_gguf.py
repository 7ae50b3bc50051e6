"""A GGUF file is read as the config, tokenizer and parameters that transformers makes of it."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llmc.compiler.frontend.demo import demo_path
from llmc.compiler.frontend.gguf import GgufFile
from llmc.errors import LlmcError

from .gguf_files import (
    LLAMA,
    LLAMA_METADATA,
    TEMPLATE,
    VOCABULARY,
    T,
    Tensors,
    check_read_back,
    llama_tensors,
    random_model,
    without,
    write,
)


def test_a_file_that_shrinks_after_opening_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    file = write(path, "llama", {}, {"w": np.ones((4, 4), np.float32)})
    path.write_bytes(path.read_bytes()[: file.tensors["w"].offset + 60])
    with pytest.raises(LlmcError, match=r"GGUF_CORRUPT.*tensor w ends 4 bytes early"):
        file.read("w")


@pytest.mark.parametrize("stored", [T.F32, T.F16, T.BF16], ids=lambda kind: kind.name)
def test_llama_is_read_back_with_its_heads_in_order(stored: T, tmp_path: Path) -> None:
    model, weights = random_model(LLAMA)
    file = write(tmp_path / "m.gguf", "llama", LLAMA_METADATA, llama_tensors(weights), stored)
    config = check_read_back(file, model)
    for key in ("rms_norm_eps", "max_position_embeddings", "rope_parameters", "vocab_size", "intermediate_size"):
        assert getattr(config, key) == getattr(LLAMA, key), key
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)
    assert not config.tie_word_embeddings
    with torch.device("meta"):
        source = file.hf_tensors(AutoModelForCausalLM.from_config(config))["model.layers.1.self_attn.k_proj.weight"]
    width = 4 if stored == T.F32 else 2
    assert (source.key, source.nbytes) == ("m.gguf:blk.1.attn_k.weight", 16 * 32 * width)


def test_llama_equals_the_model_that_transformers_loads(tmp_path: Path) -> None:
    _, weights = random_model(LLAMA)
    file = write(tmp_path / "m.gguf", "llama", LLAMA_METADATA, llama_tensors(weights))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf")
    sources = file.hf_tensors(theirs)
    assert all(torch.equal(sources[name].read(), value) for name, value in theirs.state_dict().items())
    config = AutoConfig.from_pretrained(tmp_path, gguf_file="m.gguf").to_dict()
    # These are the path of the file and the name in its metadata. A model can't be loaded from either.
    del config["_model_name_or_path"], config["_name_or_path"]
    ours = file.config().to_dict()
    assert ours.pop("_name_or_path") == ""
    assert ours == config


def test_rope_divisors_are_checked_when_the_config_is_read(tmp_path: Path) -> None:
    _, weights = random_model(LLAMA)
    tensors = llama_tensors(weights) | {"rope_freqs.weight": np.array([1, 2, 3, 4], np.float32)}
    with pytest.raises(LlmcError, match=r"GGUF_ROPE.*rope_freqs\.weight"):
        write(tmp_path / "m.gguf", "llama", LLAMA_METADATA, tensors).config()
    tensors["rope_freqs.weight"][:] = 1
    file = write(tmp_path / "m.gguf", "llama", LLAMA_METADATA, tensors)
    assert file.config().rope_parameters == LLAMA.rope_parameters
    file.hf_tensors(AutoModelForCausalLM.from_config(LLAMA))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: without(t, "blk.1.ffn_up.weight"), "no tensor holds parameter model.layers.1.mlp.up_proj.weight"),
        (
            lambda t: t | {"blk.1.ffn_gate_exps.weight": t["blk.1.ffn_gate.weight"]},
            "LlamaForCausalLM has no parameter for tensor blk.1.ffn_gate_exps.weight",
        ),
        (lambda t: t | {"blk.1.ffn_up.weight": np.ones((64, 31), np.float32)}, "holds 1984 values"),
        (
            lambda t: t | {"blk.0.attn_norm.bias": np.ones(32, np.float32)},
            "no parameter for tensor blk.0.attn_norm.bias",
        ),
    ],
    ids=["missing", "experts of another family", "size", "bias"],
)
def test_missing_and_extra_tensors_are_errors(
    change: Callable[[Tensors], Tensors], message: str, tmp_path: Path
) -> None:
    model, weights = random_model(LLAMA)
    file = write(tmp_path / "m.gguf", "llama", LLAMA_METADATA, change(llama_tensors(weights)))
    with pytest.raises(LlmcError, match=f"GGUF_TENSORS.*{message}"):
        file.hf_tensors(model)


def test_a_wrong_shape_of_the_right_size_is_an_error_when_it_is_read(tmp_path: Path) -> None:
    model, weights = random_model(LLAMA)
    tensors = llama_tensors(weights)
    tensors["blk.1.ffn_up.weight"] = tensors["blk.1.ffn_up.weight"].T.copy()
    source = write(tmp_path / "m.gguf", "llama", LLAMA_METADATA, tensors).hf_tensors(model)
    with pytest.raises(LlmcError, match=r"GGUF_TENSORS.*has the shape \[32, 64\]"):
        source["model.layers.1.mlp.up_proj.weight"].read()


def test_an_architecture_without_a_table_is_an_error(tmp_path: Path) -> None:
    file = write(tmp_path / "m.gguf", "plamo", {}, {})
    with pytest.raises(LlmcError, match=r"GGUF_ARCH.*plamo"):
        file.config()
    with pytest.raises(LlmcError, match=r"GGUF_ARCH.*nosuch"):
        write(tmp_path / "n.gguf", "nosuch", {}, {}).hf_tensors(AutoModelForCausalLM.from_config(LLAMA))


def test_the_tokenizer_comes_from_the_file_alone(tmp_path: Path) -> None:
    file = write(tmp_path / "m.gguf", "llama", LLAMA_METADATA, {})
    # Files in the same folder may belong to another model.
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "y", "add_bos_token": true}')
    tokenizer = file.tokenizer()
    ids = tokenizer("hell world<|im_end|>").input_ids
    assert [VOCABULARY[i] for i in ids] == ["he", "ll", "Ġw", "o", "r", "l", "d", "<|im_end|>"]
    assert tokenizer.decode(tokenizer("grüße\n 你好").input_ids) == "grüße\n 你好"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert tokenizer.unk_token is None
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "he"}], tokenize=True, return_dict=False)
    assert [VOCABULARY[i] for i in chat] == ["<|im_start|>", "he", "<|im_end|>"]


def test_a_saved_tokenizer_holds_no_path(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", "llama", LLAMA_METADATA, {}).tokenizer().save_pretrained(tmp_path / "out")
    for path in (tmp_path / "out").iterdir():
        assert "tmp" not in path.read_text(), path.name
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded("hell").input_ids == [VOCABULARY.index("he"), VOCABULARY.index("ll")]
    assert loaded.chat_template == TEMPLATE


def test_a_missing_or_damaged_tokenizer_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = GGUFWriter(path, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(LlmcError, match=r"GGUF_TOKENIZER.*m\.gguf"):
        GgufFile(path).tokenizer()

    write(path, "llama", LLAMA_METADATA, {})
    key = b"tokenizer.ggml.eos_token_id"
    at = path.read_bytes().index(key) + len(key) + 4
    with path.open("r+b") as file:
        file.seek(at)
        file.write(struct.pack("<I", len(VOCABULARY)))
    with pytest.raises(LlmcError, match=r"GGUF_CORRUPT.*eos_token"):
        GgufFile(path).tokenizer()


@pytest.fixture(scope="module")
def demo() -> GgufFile:
    return GgufFile(demo_path())


def test_the_demo_equals_the_model_that_transformers_loads(demo: GgufFile) -> None:
    folder, name = demo.path.parent, demo.path.name
    config = demo.config()
    with torch.device("meta"):
        sources = demo.hf_tensors(AutoModelForCausalLM.from_config(config))
    theirs = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, config=config, dtype=torch.float32)
    weights = theirs.state_dict()
    assert set(sources) == set(weights)
    for key, value in weights.items():
        assert torch.equal(sources[key].read(), value), key
    assert sources["lm_head.weight"] is sources["model.embed_tokens.weight"]


def test_the_demo_tokenizer_encodes_and_chats(demo: GgufFile) -> None:
    tokenizer = demo.tokenizer()
    text = "Hello world 123  foo\n bar don't 你好"
    ids = tokenizer(text).input_ids
    assert ids == [19556, 905, 216, 33, 34, 35, 216, 29856, 198, 2753, 1326, 982, 216, 18645, 250, 48392, 138]
    assert tokenizer.decode(ids) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer(chat).input_ids.count(tokenizer.eos_token_id) == 2
