"""The choice of a reader, and tensors that transformers changes.

transformers merges, renames or transposes them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from zoo.tiny import tiny_model

import llmc
from llmc.compiler.frontend.prequantized import find_format
from llmc.compiler.frontend.sources import find_source
from llmc.ir.stored import why_dequantized

from .files import change, refusal, weights_of, write
from .test_gptq import config, make

FP8 = {"quant_method": "fp8", "weight_block_size": None}


@pytest.mark.parametrize(
    ("quantization", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "compressed-tensors"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "fbgemm_fp8"}, "fbgemm_fp8"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
    ],
)
def test_the_config_chooses_the_reader(quantization: dict[str, Any], name: str) -> None:
    assert find_format(quantization).name == name


@pytest.mark.parametrize(
    "quantization", [{"quant_method": "hqq"}, {"quant_method": ["gptq"]}, {"bits": 4}, "gptq", [4]]
)
def test_an_unsupported_method(tmp_path: Path, quantization: Any) -> None:
    """It is refused before weights are opened: the folder contains none."""
    tiny_model("llama").config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))
    error = refusal(tmp_path)
    assert error.code == "CHECKPOINT_QUANTIZED" and "\n" not in str(error)


def test_the_config_has_no_quantization_config(tmp_path: Path) -> None:
    write(tmp_path, make(4, 16, 1), config())
    source = find_source(tmp_path)
    built = source.build(torch.float32)
    assert not hasattr(source.config, "quantization_config") and not hasattr(built.config, "quantization_config")
    assert type(built.model.layers[0].mlp.up_proj) is torch.nn.Linear


def save_quantized(folder: Path, name: str, selected: Callable[[str], bool]) -> tuple[Path, Path]:
    """Save a tiny model with the selected weights in fp8.

    Also save a plain checkpoint with the same values.
    """
    model = tiny_model(name)
    folders = folder / "fp8", folder / "plain"
    for each in folders:
        model.save_pretrained(each)
    quantized, plain = (load_file(each / "model.safetensors") for each in folders)
    for key, value in list(quantized.items()):
        if selected(key):
            scale = value.abs().max() / 448
            quantized[key] = (value / scale).to(torch.float8_e4m3fn)
            quantized[f"{key}_scale_inv"] = scale
            plain[key] = quantized[key].float() * scale
    save_file(quantized, folders[0] / "model.safetensors")
    save_file(plain, folders[1] / "model.safetensors", metadata={"format": "pt"})
    path = folders[0] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": FP8}))
    return folders


def test_experts_are_merged_as_in_a_plain_checkpoint(tmp_path: Path) -> None:
    quantized, plain = save_quantized(tmp_path, "mixtral", lambda key: "experts" in key or "self_attn" in key)
    got, want = weights_of(quantized), weights_of(plain)
    assert set(got) == set(want)
    for name, weight in want.items():
        assert torch.equal(got[name].evaluate(), weight.evaluate()), name
    experts = [name for name in got if "experts" in name]
    assert experts and all("it is changed by" in (why_dequantized(got[name]) or "") for name in experts)


@pytest.mark.parametrize("part", ["", "_scale_inv"])
def test_a_missing_expert_names_its_tensor_and_the_format(tmp_path: Path, part: str) -> None:
    quantized, _ = save_quantized(tmp_path, "mixtral", lambda key: "experts" in key)
    name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    change(quantized, lambda tensors: tensors.pop(f"{name}{part}"))
    error = refusal(quantized)
    assert error.code == "WEIGHTS_MISSING" and f"{name}{part}" in error.what and "fp8" in error.what


def test_a_failed_merge_names_the_format(tmp_path: Path) -> None:
    quantized, _ = save_quantized(tmp_path, "mixtral", lambda key: "experts" in key)
    name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"

    def remove(tensors: dict[str, Tensor]) -> None:
        del tensors[name], tensors[f"{name}_scale_inv"]

    change(quantized, remove)
    error = refusal(quantized)
    assert error.code == "WEIGHTS_MISMATCH" and "experts" in error.what and "(fp8)" in error.what


def test_a_missing_linear_names_the_format(tmp_path: Path) -> None:
    write(tmp_path, make(4, 16, 1), config())
    name = "model.layers.0.mlp.up_proj"

    def remove(tensors: dict[str, Tensor]) -> None:
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            del tensors[f"{name}.{part}"]

    change(tmp_path, remove)
    error = refusal(tmp_path)
    assert error.code == "WEIGHTS_MISSING" and f"{name}.weight" in error.what and "(gptq)" in error.what


def test_codes_of_a_weight_that_the_model_stores_transposed(tmp_path: Path) -> None:
    """The weight is square, so that its shape does not reveal the transposition."""
    quantized, _ = save_quantized(tmp_path, "gpt2", lambda key: key.endswith("attn.c_proj.weight"))
    error = refusal(quantized)
    assert error.code == "CHECKPOINT_QUANTIZED" and "c_proj.weight" in error.what and "transposed" in error.what


def test_codes_without_scales_are_not_plain_numbers(tmp_path: Path) -> None:
    """Experts whose scales have an unknown name must not be read as plain numbers."""
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path, save_original_format=False)
    (name,) = {
        key for key in load_file(tmp_path / "model.safetensors") if key.endswith("layers.0.mlp.experts.down_proj")
    }
    change(tmp_path, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": FP8}))
    error = refusal(tmp_path)
    assert error.code == "CHECKPOINT_QUANTIZED" and name in error.what and "float8_e4m3fn" in error.what


def test_capture_reads_no_weight_but_g_idx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmc.ir.weights import SafetensorsSource

    read: set[str] = set()
    original = SafetensorsSource.read

    def recording_read(source: SafetensorsSource) -> Tensor:
        read.add(source.name.rpartition(".")[2])
        return original(source)

    write(tmp_path, make(4, 16, 1), config())
    monkeypatch.setattr(SafetensorsSource, "read", recording_read)
    llmc.capture(tmp_path)
    assert read == {"g_idx"}
