"""Programs that TensorRT can't run are refused before the build. The message has the limit and an alternative."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import llmc
from llmc.compiler.targets.registry import find_target, make_config
from llmc.compiler.targets.tensorrt import supported
from llmc.errors import LlmcError, UsageError
from llmc.ir.weights import cast

SIZES = {"hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 64}


def model(heads: int, head_dim: int, positions: int = 64) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            **SIZES, num_attention_heads=heads, num_key_value_heads=1, head_dim=head_dim,
            max_position_embeddings=positions,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ({"dtype": "fp32"}, "DTYPE_SLOW", "fp16, bf16"),
        ({"kv_cache": "ring"}, "CONFIG_INVALID", "static"),
        ({"kv_cache_dtype": "int8"}, "CONFIG_INVALID", "auto"),
        ({"quantize": "nf4"}, "CONFIG_INVALID", "int8, int4, w8a8, fp8"),
        ({"quantize": "int8", "group_size": 64}, "CONFIG_INVALID", "no groups"),
        ({"quantize": "int4", "group_size": 256}, "CONFIG_INVALID", "128, 64, 32, 16"),
        ({"sm": "ada"}, "CONFIG_INVALID", "8.9"),
        ({"max_batch_size": 1}, "CONFIG_INVALID", "2 to"),
        ({"export": "triton-server"}, "CONFIG_INVALID", "no engine is built"),
    ],
)
def test_refused_options(options: dict[str, Any], code: str, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        make_config(target="trt", engine=False, **options)
    assert refused.value.code == code and said in str(refused.value)


def test_the_other_target_keeps_its_defaults() -> None:
    ort, trt = find_target("ort"), find_target("trt")
    config = make_config()
    assert (ort.dtype(config), ort.cache_kind(config)) == ("fp32", "ring")
    assert (trt.dtype(config), trt.cache_kind(config)) == ("fp16", "static")


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ({"quantize": "fp8", "sm": "8.6"}, "TRT_UNSUPPORTED", "8.6"),
        ({"quantize": "fp8", "sm": "8.9,8.0"}, "TRT_UNSUPPORTED", "8.0"),
        ({"sm": "9.0"}, "TRT_SM_UNSUPPORTED", "8.9"),
        ({"export": "triton-server"}, "SERVER_PLAN_MISSING", "tensorrt_rtx builds others"),
    ],
)
def test_refused_gpus(options: dict[str, Any], code: str, said: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(LlmcError) as refused:
        make_config(target="trt", library="tensorrt_rtx", **options)
    assert refused.value.code == code and said in str(refused.value)


def test_a_library_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmc.runtimes.engines.tensorrt.library.installed_libraries", list)
    with pytest.raises(LlmcError, match="TENSORRT_MISSING"):
        make_config(target="trt")
    make_config(target="trt", engine=False)
    assert "tensorrt" in (find_target("trt").missing("compile") or "")


@pytest.mark.parametrize(("heads", "head_dim", "positions"), [(1, 512, 64), (2, 64, 24_576)])
def test_refused_models(heads: int, head_dim: int, positions: int, tmp_path: Path) -> None:
    """No weight has been quantized by then."""
    phases: list[str] = []
    with pytest.raises(LlmcError) as refused:
        llmc.compile(
            model(heads, head_dim, positions), tmp_path / "out", target="trt", engine=False, max_seq_len=positions,
            watch=lambda phase, done, total: phases.append(phase),
        )  # fmt: skip
    assert refused.value.code == "TRT_UNSUPPORTED" and "model.layers.0.self_attn" in refused.value.what
    assert (f"{head_dim};" if head_dim == 512 else f"{positions:,}") in refused.value.what
    assert "quantize" not in phases and not (tmp_path / "out").exists()


def test_keys_that_are_wider_than_the_weights_are_refused() -> None:
    program = llmc.capture(model(2, 64))
    supported.check_attentions(program)
    name = next(iter(program.weights))
    program.weights[name] = cast(program.weights[name], torch.bfloat16)
    with pytest.raises(LlmcError, match="self_attn computes in float32, and the weights are in bfloat16"):
        supported.check_attentions(program)
