"""Weights of safetensors folders equal those of transformers.

Each kind of damage is refused.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from check_pass import inputs
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from zoo.tiny import tiny_model, tiny_model_types

import llmc
from llmc.compiler.frontend.checkpoint import match_checkpoint, open_safetensors
from llmc.ir.stages import Stage
from llmc.ir.weights import SafetensorsSource


def tiny(name: str) -> PreTrainedModel:
    """A tiny model of a type; `tied` is a llama with a tied LM head."""
    if name != "tied":
        return tiny_model(name)
    model = tiny_model("llama")
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def saved(folder: Path, name: str, **options: Any) -> Path:
    tiny(name).save_pretrained(folder, **options)
    return folder


def reference(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count how often each tensor of a file is read."""
    counts: Counter[str] = Counter()
    read = SafetensorsSource.read

    def counting_read(source: SafetensorsSource) -> Tensor:
        counts[source.name] += 1
        return read(source)

    monkeypatch.setattr(SafetensorsSource, "read", counting_read)
    return counts


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("llama", Stage.OPTIMIZED),
        ("tied", Stage.OPTIMIZED),
        ("mixtral", Stage.OPTIMIZED),
        ("gpt_oss", Stage.CAPTURED),
        ("deepseek_v3", Stage.CAPTURED),
        ("qwen3_moe", Stage.CANONICAL),
    ],
)
def test_a_captured_folder_equals_the_saved_model(tmp_path: Path, reads: Counter[str], name: str, stage: Stage) -> None:
    folder = saved(tmp_path, name)
    program = llmc.capture(folder, until=stage)
    assert not reads, "capture must not read weights"
    on_disk = set(load_file(folder / "model.safetensors"))
    for weight in program.weights.values():
        weight.evaluate()
    assert reads == dict.fromkeys(on_disk, 1), "each tensor of the file is read once"
    model = reference(folder)
    for size in ((2, 9), (1, 1)):
        tokens, positions = inputs(*size)
        with torch.no_grad():
            want = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(program(tokens, positions), want, atol=1e-5, rtol=0)


def check_weights(folder: Path, model: PreTrainedModel | None = None) -> None:
    """Check that weights equal those of transformers, and that none is missing."""
    model = model or reference(folder)
    matched = match_checkpoint(model, open_safetensors(folder))
    state = model.state_dict()
    assert set(matched) <= set(state)
    for name, weight in matched.items():
        assert torch.equal(weight.evaluate(), state[name]), name
    missing = [
        n for n, p in model.named_parameters(remove_duplicate=False) if n not in matched and p is not _embedding(model)
    ]
    assert not missing


def _embedding(model: PreTrainedModel) -> Tensor:
    return model.get_input_embeddings().weight


# The files have one tensor per expert, the model one for all: stacked, concatenated, transposed.
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "granitemoe", "jetmoe", "dbrx", "ernie4_5_moe", "phimoe"])
def test_weights_are_converted_as_in_transformers(tmp_path: Path, name: str) -> None:
    check_weights(saved(tmp_path, name))


# Some renamings would change names that are already the model's.
@pytest.mark.parametrize("name", sorted({"mixtral", "laguna", "deepseek_v4"} & set(tiny_model_types())))
def test_a_checkpoint_may_use_the_models_own_names(tmp_path: Path, name: str) -> None:
    check_weights(saved(tmp_path, name, save_original_format=False))


def test_experts_are_stacked_in_numeric_order(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    config = model.config
    config.num_local_experts = 11  # `experts.10` sorts before `experts.2` as text
    type(model)._from_config(config).save_pretrained(tmp_path)
    check_weights(tmp_path)


def test_shards_are_read_as_one_checkpoint(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama", max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    check_weights(folder)


def test_shards_need_no_index(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama", max_shard_size="40KB")
    model = reference(folder)
    (folder / "model.safetensors.index.json").unlink()
    check_weights(folder, model)


def test_a_whole_file_is_preferred_over_shards_as_in_transformers(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama", max_shard_size="40KB")
    whole = {name: tensor + 1 for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    check_weights(folder)


def test_a_half_precision_checkpoint_is_converted_to_float32(tmp_path: Path) -> None:
    tiny("tied").to(torch.bfloat16).save_pretrained(tmp_path)
    program = llmc.capture(tmp_path, until=Stage.CAPTURED)
    state = reference(tmp_path).state_dict()
    for name, weight in program.weights.items():
        if not weight.is_constant:
            assert weight.dtype == torch.float32
            assert torch.equal(weight.evaluate(), state[name]), name


def test_tensors_that_the_model_does_not_use_are_ignored(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama")
    path = folder / "model.safetensors"
    save_file(load_file(path) | {"score.weight": torch.ones(3)}, path)
    assert "score.weight" not in match_checkpoint(tiny("llama"), open_safetensors(folder))


# Damage -------------------------------------------------------------------------------------------------------------


def refusal(folder: Path) -> llmc.LlmcError:
    with pytest.raises(llmc.LlmcError) as caught:
        llmc.capture(folder)
    error = caught.value
    assert "\n" not in str(error), "an error is one paragraph"
    assert error.what.endswith(".") and error.hint.endswith((".", '"'))
    return error


def saved_file(folder: Path) -> Path:
    return saved(folder, "llama") / "model.safetensors"


def header_of(path: Path) -> tuple[int, dict[str, Any]]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return length, json.loads(raw[8 : 8 + length])


@pytest.mark.parametrize("keep", [0, 4, 8, 9, 200, -1, -1000])
def test_a_truncated_file(tmp_path: Path, keep: int) -> None:
    path = saved_file(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    error = refusal(tmp_path)
    assert error.code == "WEIGHTS_CORRUPT" and str(path) in error.what


def test_a_file_truncated_after_its_header(tmp_path: Path) -> None:
    path = saved_file(tmp_path)
    length, _ = header_of(path)
    path.write_bytes(path.read_bytes()[: 8 + length])
    error = refusal(tmp_path)
    assert error.code == "WEIGHTS_CORRUPT" and "is truncated" in error.what


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Replace the file's header and keep its data."""
    length, header = header_of(path)
    data = path.read_bytes()[8 + length :]
    raw = json.dumps(change(header) or header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: ["no", "table"],
        lambda header: {"w": {"dtype": "F32", "shape": [2]}},
        lambda header: {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        lambda header: {"w": {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}},
        lambda header: {"w": {"dtype": "F31", "shape": [2], "data_offsets": [0, 8]}},
        lambda header: {"w": 3},
    ],
)
def test_an_invalid_header(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = saved_file(tmp_path)
    rewrite_header(path, change)
    error = refusal(tmp_path)
    assert error.code == "WEIGHTS_CORRUPT" and str(path) in error.what


def test_a_file_that_is_not_a_safetensors_file(tmp_path: Path) -> None:
    saved_file(tmp_path).write_bytes(b"<html>not found</html>" * 100)
    assert refusal(tmp_path).code == "WEIGHTS_CORRUPT"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_an_invalid_index(tmp_path: Path, text: str) -> None:
    saved(tmp_path, "llama", max_shard_size="40KB")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    error = refusal(tmp_path)
    assert error.code == "WEIGHTS_CORRUPT" and "index" in error.what


def test_a_missing_shard(tmp_path: Path) -> None:
    saved(tmp_path, "llama", max_shard_size="40KB")
    missing = sorted(tmp_path.glob("*.safetensors"))[1]
    missing.unlink()
    error = refusal(tmp_path)
    assert error.code == "WEIGHTS_MISSING" and missing.name in error.what


def test_a_folder_without_weights(tmp_path: Path) -> None:
    saved_file(tmp_path).unlink()
    assert refusal(tmp_path).code == "WEIGHTS_MISSING"


def test_a_folder_with_pickles_only(tmp_path: Path) -> None:
    path = saved_file(tmp_path)
    torch.save(load_file(path), tmp_path / "pytorch_model.bin")
    path.unlink()
    error = refusal(tmp_path)
    assert error.code == "WEIGHTS_PICKLE"
    assert "pytorch_model.bin" in error.what and "save_pretrained" in error.hint


def save_changed(folder: Path, name: str, change: Callable[[dict[str, Tensor]], Any]) -> None:
    path = saved(folder, name) / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_missing_weight(tmp_path: Path) -> None:
    save_changed(tmp_path, "llama", lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    error = refusal(tmp_path)
    assert error.code == "WEIGHTS_MISSING" and "model.layers.1.mlp.up_proj.weight" in error.what


def test_a_missing_embedding_that_is_tied_to_the_lm_head(tmp_path: Path) -> None:
    save_changed(tmp_path, "tied", lambda tensors: tensors.pop("model.embed_tokens.weight"))
    assert refusal(tmp_path).code == "WEIGHTS_MISSING"


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("llama", "model.norm.weight"),
        ("deepseek_v3", "model.layers.1.mlp.gate.e_score_correction_bias"),  # a buffer
        ("mixtral", "model.layers.0.block_sparse_moe.experts.1.w3.weight"),  # merged with others
    ],
)
def test_a_weight_of_the_wrong_shape(tmp_path: Path, name: str, weight: str) -> None:
    def shorten(tensors: dict[str, Tensor]) -> None:
        tensors[weight] = tensors[weight][:-1].contiguous()

    save_changed(tmp_path, name, shorten)
    assert refusal(tmp_path).code == "WEIGHTS_MISMATCH"


@pytest.mark.parametrize("part", ["w1", "w2"])
def test_a_missing_expert(tmp_path: Path, part: str) -> None:
    save_changed(
        tmp_path,
        "mixtral",
        lambda tensors: tensors.pop(f"model.layers.0.block_sparse_moe.experts.1.{part}.weight"),
    )
    assert refusal(tmp_path).code == "WEIGHTS_MISMATCH"


def test_a_config_of_another_model(tmp_path: Path) -> None:
    path = saved_file(tmp_path).parent / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"intermediate_size": 2 * config["intermediate_size"]}))
    error = refusal(tmp_path)
    assert error.code == "WEIGHTS_MISMATCH" and "mlp" in error.what
