"""Q8_0 and Q4_0 codes are kept byte by byte; codes of other types are reported when they are not kept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from gguf import GGML_QUANT_SIZES, quants
from onnx import numpy_helper
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import llmc
from llmc.compiler.frontend.gguf import GgufFile
from llmc.compiler.frontend.gguf_header import SUPPORTED_TYPES, GgufTensorInfo
from llmc.compiler.frontend.gguf_weights import GgufSource
from llmc.ir.stages import Stage
from llmc.ir.stored import StoredCodes, stored_codes, why_dequantized
from llmc.ir.weights import Leaf, Weight

from .gguf_files import LLAMA_METADATA, VOCABULARY, T, Tensors, gguf_name, llama_tensors, rope_rows, write

HIDDEN, INNER, HEADS = 64, 256, {"attn_q": 4, "attn_k": 2}
METADATA = LLAMA_METADATA | {"embedding_length": HIDDEN, "feed_forward_length": INNER, "rope.dimension_count": 16}
SCHEMES = {T.Q8_0: "int8", T.Q4_0: "int4"}
KEPT = pytest.mark.parametrize("kind", SCHEMES, ids=lambda kind: kind.name)


def tiny_llama(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=0.5, max_position_embeddings=99,
        rope_parameters={"rope_type": "default", "rope_theta": 777.0}, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tensors_of(model: LlamaForCausalLM) -> Tensors:
    return llama_tensors({name: value.numpy().copy() for name, value in model.state_dict().items()})


def write_llama(folder: Path, stored: T, types: Mapping[str, T] | None = None, tied: bool = False) -> GgufFile:
    tensors = tensors_of(tiny_llama(tied))
    if tied:
        del tensors["output.weight"]
    return write(folder / "m.gguf", "llama", METADATA, tensors, stored, types)


def weights_of(file: GgufFile) -> dict[str, Weight]:
    with torch.device("meta"):
        return file.hf_weights(AutoModelForCausalLM.from_config(file.config()))


def stored_blocks(file: GgufFile, info: GgufTensorInfo) -> np.ndarray:
    """Return the blocks of a matrix in the order of transformers' output channels, [outputs, groups, bytes]."""
    raw = np.frombuffer(file.path.read_bytes()[info.offset : info.offset + info.nbytes], np.uint8)
    outputs, inputs = info.shape
    block, size = GGML_QUANT_SIZES[info.type]
    blocks = raw.reshape(outputs, inputs // block, size)
    if heads := HEADS.get(info.name.split(".")[-2]):
        stored_as = rope_rows(np.arange(outputs)[:, None], heads)[:, 0]  # the channel that each stored one is
        blocks = blocks[np.argsort(stored_as)]
    return blocks


def expected_codes(file: GgufFile, info: GgufTensorInfo) -> Tensor:
    """Read the codes one by one, [outputs, inputs]: -128..127 for Q8_0, 0..15 for Q4_0."""
    codes = []
    for block in stored_blocks(file, info).reshape(-1, GGML_QUANT_SIZES[info.type][1]).tolist():
        if info.type == T.Q8_0:
            codes += [byte - 256 if byte > 127 else byte for byte in block[2:]]
        else:
            codes += [block[2 + i % 16] >> 4 * (i // 16) & 15 for i in range(32)]
    return torch.tensor(codes).view(info.shape)


def expected_scales(file: GgufFile, info: GgufTensorInfo) -> np.ndarray:
    """Return the scales of the blocks as they are stored, float16 [outputs, groups]."""
    return np.ascontiguousarray(stored_blocks(file, info)[:, :, :2]).view(np.float16)[:, :, 0]


def unpacked(stored: StoredCodes) -> Tensor:
    """Return one code per number, however the scheme packs them."""
    codes = stored.codes.evaluate()
    if stored.scheme == "int8":
        assert codes.dtype == torch.int8
        return codes.long()
    assert stored.scheme == "int4" and codes.dtype == torch.uint8
    pairs = [[byte & 15, byte >> 4] for byte in codes.flatten().tolist()]
    return torch.tensor(pairs).view(codes.shape[0], -1)


@KEPT
def test_codes_and_scales_are_those_of_the_file(kind: T, tmp_path: Path) -> None:
    file = write_llama(tmp_path, kind)
    weights, model = weights_of(file), tiny_llama()
    matrices = [name for name, value in model.state_dict().items() if value.ndim == 2]
    assert len(matrices) == 16 and weights.keys() == model.state_dict().keys()
    for name in matrices:
        info, stored = file.tensors[gguf_name(name)], stored_codes(weights[name])
        assert stored is not None and why_dequantized(weights[name]) is None, name
        assert (stored.scheme, stored.group_size, stored.zeros) == (SCHEMES[kind], 32, None)
        assert torch.equal(unpacked(stored), expected_codes(file, info)), name
        scales = stored.scales.evaluate()
        assert scales.dtype == torch.float32 and scales.is_contiguous()
        assert np.array_equal(scales.numpy(), expected_scales(file, info).astype(np.float32)), name


@KEPT
def test_values_are_those_of_the_gguf_package(kind: T, tmp_path: Path) -> None:
    file = write_llama(tmp_path, kind)
    with torch.device("meta"):
        sources = file.hf_tensors(AutoModelForCausalLM.from_config(file.config()))
    for name, weight in weights_of(file).items():
        info = file.tensors[gguf_name(name)]
        assert weight.dtype == torch.float32 and weight.shape == info.shape
        if len(info.shape) == 2:
            values = quants.dequantize(stored_blocks(file, info).reshape(info.shape[0], -1), kind)
            assert np.array_equal(weight.evaluate().numpy(), values), name
        assert torch.equal(weight.evaluate(), sources[name].read()), name


def test_negative_and_zero_scales_are_kept(tmp_path: Path) -> None:
    """Q4_0 has a negative scale for a block whose largest magnitude is positive."""
    tensors = tensors_of(tiny_llama())
    tensors["blk.0.ffn_up.weight"][:2] = 0
    tensors["blk.0.ffn_up.weight"][0, 0] = 1
    file = write(tmp_path / "m.gguf", "llama", METADATA, tensors, T.Q4_0)
    stored = stored_codes(weights_of(file)["model.layers.0.mlp.up_proj.weight"])
    assert stored is not None
    assert stored.scales.evaluate()[:2].tolist() == [[-0.125, 0], [0, 0]]
    assert stored.evaluate()[:2].count_nonzero() == stored.evaluate()[0, 0] == 1


@KEPT
def test_merged_projections_keep_their_codes(kind: T, tmp_path: Path) -> None:
    file = write_llama(tmp_path, kind)
    program = llmc.capture(file.path, until=Stage.OPTIMIZED)
    for name, parts in {
        "model.layers.1.self_attn.qkv_proj.weight": ["attn_q", "attn_k", "attn_v"],
        "model.layers.0.mlp.gate_up_proj.weight": ["ffn_gate", "ffn_up"],
    }.items():
        stored = stored_codes(program.weights[name])
        assert stored is not None and (stored.scheme, stored.group_size) == (SCHEMES[kind], 32)
        infos = [file.tensors[f"blk.{name.split('.')[2]}.{part}.weight"] for part in parts]
        assert torch.equal(unpacked(stored), torch.cat([expected_codes(file, info) for info in infos]))
        scales = np.concatenate([expected_scales(file, info) for info in infos]).astype(np.float32)
        assert np.array_equal(stored.scales.evaluate().numpy(), scales)


@pytest.mark.parametrize(
    ("other", "reason"),
    [(T.Q4_0, "of another scheme"), (T.F16, "not quantized"), (T.Q5_0, "no scheme holds codes of GGUF type Q5_0")],
    ids=["Q4_0", "F16", "Q5_0"],
)
def test_merging_with_another_type_is_reported(other: T, reason: str, tmp_path: Path) -> None:
    file = write_llama(tmp_path, T.Q8_0, {"blk.0.attn_v.weight": other})
    program = llmc.capture(file.path, until=Stage.OPTIMIZED)
    merged, single = (program.weights[f"model.layers.{layer}.self_attn.qkv_proj.weight"] for layer in (0, 1))
    assert stored_codes(merged) is None and reason in (why_dequantized(merged) or "")
    assert stored_codes(single) is not None


@pytest.mark.parametrize("kind", sorted(SUPPORTED_TYPES - {*SCHEMES, T.F32, T.F16, T.BF16}), ids=lambda kind: kind.name)
def test_other_block_types_are_reported_by_name(kind: T, tmp_path: Path) -> None:
    name = "blk.1.ffn_down.weight"  # 256 inputs, one block of every type
    file = write_llama(tmp_path, T.F32, {name: kind})
    weight = weights_of(file)["model.layers.1.mlp.down_proj.weight"]
    assert stored_codes(weight) is None
    assert (why_dequantized(weight) or "").endswith(f"GGUF type {kind.name}")
    info = file.tensors[name]
    values = quants.dequantize(stored_blocks(file, info).reshape(HIDDEN, -1), kind)
    assert np.array_equal(weight.evaluate().numpy(), values)


@pytest.mark.parametrize("kind", [T.F32, T.F16, T.BF16], ids=lambda kind: kind.name)
def test_float_types_have_nothing_to_report(kind: T, tmp_path: Path) -> None:
    weights = weights_of(write_llama(tmp_path, kind)).values()
    assert all(isinstance(weight, Leaf) and why_dequantized(weight) is None for weight in weights)


def test_an_embedding_alone_is_not_kept(tmp_path: Path) -> None:
    """A model whose layers are not kept stays a float model, whatever type its embedding and LM head have."""
    ends = {"token_embd.weight": T.Q8_0, "output.weight": T.Q4_0}
    weights = weights_of(write_llama(tmp_path, T.Q4_1, ends))
    for name, kind in {"model.embed_tokens.weight": "Q8_0", "lm_head.weight": "Q4_0"}.items():
        assert stored_codes(weights[name]) is None
        assert why_dequantized(weights[name]) == f"it is {kind}, but no matrix of a layer keeps Q8_0 or Q4_0 codes"
    weights = weights_of(write_llama(tmp_path, T.Q4_1, ends | {"blk.1.ffn_down.weight": T.Q4_0}))
    assert all(stored_codes(weights[f"{name}.weight"]) for name in ("model.embed_tokens", "lm_head"))


@KEPT
def test_a_tied_head_is_the_same_weight(kind: T, tmp_path: Path) -> None:
    weights = weights_of(write_llama(tmp_path, kind, tied=True))
    assert weights["lm_head.weight"] is weights["model.embed_tokens.weight"]
    assert stored_codes(weights["lm_head.weight"]) is not None


def test_no_weight_is_read_to_capture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_llama(tmp_path, T.Q8_0)

    def read(source: GgufSource) -> Tensor:
        raise AssertionError(f"{source} was read")

    monkeypatch.setattr(GgufSource, "read", read)
    program = llmc.capture(file.path, until=Stage.OPTIMIZED)
    leaves = {leaf.key: leaf.source.nbytes for weight in program.weights.values() for leaf in weight.leaves()}
    stored = sum(info.nbytes for info in file.tensors.values())
    assert sum(size for key, size in leaves.items() if key.startswith("m.gguf:")) == stored


def initializers(folder: Path) -> dict[str, np.ndarray]:
    model = onnx.load(folder / "model.onnx")
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


@pytest.mark.parametrize(("quantize", "tied"), [(None, False), ("int4", True)], ids=["as stored", "int4, tied"])
@KEPT
def test_an_artifact_holds_the_codes_of_the_file(kind: T, quantize: str | None, tied: bool, tmp_path: Path) -> None:
    """Also if another scheme is chosen, for codes of the checkpoint are never quantized again."""
    file = write_llama(tmp_path, kind, tied=tied)
    artifact = llmc.compile(file.path, tmp_path / "out", quantize=quantize, algo="rtn" if quantize else None)
    report = json.loads((artifact.path / "verify.json").read_text())
    assert report["passed"] and report["precision"] == SCHEMES[kind]
    said = artifact.manifest.quantization
    assert said is not None and said.why == ""
    assert said.weights == {f"{SCHEMES[kind]} in groups of 32": 9 if tied else 10}

    arrays = initializers(artifact.path)
    for name in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj", "model.embed_tokens"):
        info = file.tensors[gguf_name(f"{name}.weight")]
        wanted = expected_codes(file, info).numpy()
        # ONNX Runtime's kernels take int8 codes as bytes that are 128 higher, and int4 codes two in a byte.
        wanted = wanted + 128 if kind == T.Q8_0 else wanted[:, ::2] | wanted[:, 1::2] << 4
        holders = [array for array in arrays.values() if array.dtype == np.uint8 and array.size == wanted.size]
        assert any(np.array_equal(array.reshape(wanted.shape), wanted) for array in holders), name
        scales = expected_scales(file, info).astype(np.float32)
        holders = [array for array in arrays.values() if array.dtype == np.float32 and array.size == scales.size]
        assert any(np.array_equal(array.reshape(scales.shape), scales) for array in holders), name


def test_a_model_that_keeps_no_codes_stays_a_float_model(tmp_path: Path) -> None:
    """Its files are those of the dequantized values, its gate is that of float32, and the manifest says why."""
    types = {"token_embd.weight": T.Q8_0, "blk.0.ffn_down.weight": T.Q6_K}
    file = write_llama(tmp_path, T.Q4_1, types)
    quantized = llmc.compile(file.path, tmp_path / "quantized")
    said = quantized.manifest.quantization
    assert said is not None
    assert (said.scheme, said.precision, said.weights) == (None, "fp32", {"fp32": 10})
    assert "codes of 10 weights are not kept" in said.why and "again" not in said.why
    for reason in ("8 because no scheme holds codes of GGUF type Q4_1", "GGUF type Q6_K", "it is Q8_0"):
        assert reason in said.why
    assert json.loads((quantized.path / "verify.json").read_text())["precision"] == "fp32"

    values = {name: file.read(name).numpy().copy() for name in file.tensors}
    (tmp_path / "float").mkdir()
    plain = write(tmp_path / "float" / "m.gguf", "llama", METADATA, values, T.F32)
    floats = llmc.compile(plain.path, tmp_path / "floats")
    assert floats.manifest.quantization is None
    for name in ("model.onnx", "model.onnx.data"):
        assert (floats.path / name).read_bytes() == (quantized.path / name).read_bytes(), name


def test_codes_that_are_quantized_again_are_reported(tmp_path: Path) -> None:
    file = write_llama(tmp_path, T.Q8_0, {f"blk.{layer}.ffn_down.weight": T.Q6_K for layer in (0, 1)})
    artifact = llmc.compile(file.path, tmp_path / "out", quantize="int4", algo="rtn", raise_share=0.0)
    said = artifact.manifest.quantization
    assert said is not None
    assert said.weights["int8 in groups of 32"] == 8 and sum(said.weights.values()) == 10
    assert said.why == (
        "the checkpoint's codes of 2 weights are not kept, and all of them are quantized again: "
        "no scheme holds codes of GGUF type Q6_K"
    )
