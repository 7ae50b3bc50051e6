"""The numbers of a plan agree with the model, and planning reads no weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from zoo.tiny import tiny_model

from llmc import LlmcError
from llmc.compiler.frontend.gguf_weights import GgufSource
from llmc.compiler.inspect.plan import plan
from llmc.ir.weights import SafetensorsSource


def save(model_type: str, folder: Path) -> nn.Module:
    model = tiny_model(model_type)
    model.save_pretrained(folder)
    return model


@pytest.fixture(autouse=True)
def no_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(self: object) -> Tensor:
        raise AssertionError(f"{self} was read")

    monkeypatch.setattr(SafetensorsSource, "read", read)
    monkeypatch.setattr(GgufSource, "read", read)


def test_parameters_and_bytes(tmp_path: Path) -> None:
    model = save("llama", tmp_path)
    result = plan(tmp_path, dtype="bf16")
    count = sum(p.numel() for p in model.parameters())
    assert result.total.parameters == count
    assert result.total.bytes == 2 * count
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert result.total.disk_bytes == sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    layers = {name: p.numel() for name, p in model.named_parameters()}
    assert {name: group.parameters for name, group in result.groups.items()} == {
        "embedding": layers["model.embed_tokens.weight"],
        "attention": sum(n for name, n in layers.items() if "self_attn" in name),
        "mlp": sum(n for name, n in layers.items() if ".mlp." in name),
        "norms": sum(n for name, n in layers.items() if "norm" in name),
        "head": layers["lm_head.weight"],
    }
    assert result.groups["attention"].tensors == 8
    assert result.coverage.dialect["llmc.linear"] == 2 * 7 + 1
    assert result.coverage.fallbacks == ()


def test_a_tied_head_is_counted_once(tmp_path: Path) -> None:
    model = save("gemma3_text", tmp_path)
    result = plan(tmp_path)
    assert result.total.parameters == sum(p.numel() for p in model.parameters())
    assert "head" not in result.groups


def test_experts_have_their_own_group(tmp_path: Path) -> None:
    model = save("mixtral", tmp_path)
    result = plan(tmp_path)
    experts = {n: p.numel() for n, p in model.named_parameters() if "experts" in n}
    assert result.groups["experts"].parameters == sum(experts.values())
    # The checkpoint has one tensor per expert; the number of bytes is the same.
    assert result.total.disk_bytes == result.total.bytes == 4 * result.total.parameters


def test_a_window_limits_the_cache_of_its_layer(tmp_path: Path) -> None:
    config = save("gemma3_text", tmp_path).config
    result = plan(tmp_path, max_seq_len=100, max_batch_size=3)
    token = config.num_key_value_heads * 2 * config.head_dim * 4
    assert [layer.bytes_per_token for layer in result.kv_cache] == [token, token]
    assert [layer.limit for layer in result.kv_cache] == [config.sliding_window, None]
    assert result.kv_bytes_per_token == 2 * token
    assert result.kv_bytes == 3 * token * (config.sliding_window + 100)


@pytest.mark.parametrize("length", [9, 100])
def test_slack_makes_the_cache_of_a_window_longer(tmp_path: Path, length: int) -> None:
    config = save("gemma3_text", tmp_path).config
    result = plan(tmp_path, max_seq_len=length, spec_tokens=4)
    token = config.num_key_value_heads * 2 * config.head_dim * 4
    assert [layer.limit for layer in result.kv_cache] == [config.sliding_window + 4, None]
    assert result.kv_bytes == token * (min(config.sliding_window + 4, length) + length)


@pytest.mark.parametrize("codes", ["int8", "fp8"])
def test_quantized_keys_and_values_have_scales(tmp_path: Path, codes: str) -> None:
    config = save("gemma3_text", tmp_path).config
    result = plan(tmp_path, max_seq_len=100, kv_cache_dtype=codes)
    codes_only, token = (config.num_key_value_heads * 2 * (config.head_dim + scale) for scale in (0, 4))
    whole = codes_only if codes == "int8" else token  # calibration makes the scales of int8 codes constants
    assert [layer.bytes_per_token for layer in result.kv_cache] == [token, whole]
    assert result.kv_bytes == token * config.sliding_window + whole * 100 and "scale" in result.formulas["kv cache"]
    assert ("constants" in result.formulas["kv cache"]) == (codes == "int8")


@pytest.mark.parametrize("wrong", [{"kv_cache_dtype": "int4"}, {"spec_tokens": 65}, {"spec_tokens": -1}])
def test_a_wrong_option_of_the_cache_is_refused_before_any_work(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(LlmcError, match="CONFIG_INVALID"):
        plan(tmp_path / "no such model", **wrong)


def test_keys_and_values_may_differ_in_width(tmp_path: Path) -> None:
    config = save("deepseek_v3", tmp_path).config
    (layer, _) = plan(tmp_path, dtype="fp16").kv_cache
    assert config.qk_head_dim != config.v_head_dim
    assert layer.bytes_per_token == config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * 2


def test_attentions_that_share_keys_and_values_share_a_cache() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(10, 8), nn.Linear(8, 10)
            self.queries = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
            self.keys = nn.Linear(8, 8)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens)
            k = self.keys(x).unflatten(-1, (2, 4)).transpose(1, 2)
            for query in self.queries:
                q = query(x).unflatten(-1, (2, 4)).transpose(1, 2)
                x = x + F.scaled_dot_product_attention(q, k, k, is_causal=True).transpose(1, 2).flatten(2)
            return self.head(x)

    result = plan(Model())
    assert result.coverage.dialect["llmc.attention"] == 2
    assert [layer.bytes_per_token for layer in result.kv_cache] == [2 * (4 + 4) * 4]


def test_estimates_follow_their_formulas() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Embedding(10, 100)
            self.head = nn.Linear(100, 50)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.embed(tokens))

    result = plan(Model())
    assert set(result.output_bytes) == {"fp32", "bf16", "int8", "int4", "int4 --raise 0"}
    assert (result.largest_tensor, result.largest_tensor_bytes) == ("head.weight", 4 * 5000)
    assert result.peak_bytes > 2 * 4 * 5000 + (50 << 20)  # the estimate includes the memory of torch itself
    assert set(result.groups) == {"embedding", "head"}
    assert result.kv_bytes == 0


def test_a_miss_that_leaves_plain_ops_is_a_fallback() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(10, 8), nn.Linear(8, 10)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens)
            return self.head(x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-5))

    coverage = plan(Model()).coverage
    (name, miss) = coverage.fallbacks[0]
    assert name == "MatchRmsNorm"
    assert "no mean" in miss.reason
    assert coverage.aten["aten.rsqrt"] == 1
    assert "llmc.rms_norm" not in coverage.dialect


def test_a_model_that_is_refused_has_no_plan(tmp_path: Path) -> None:
    save("mamba", tmp_path)
    with pytest.raises(LlmcError, match="CAPTURE_SPECIALIZED"):
        plan(tmp_path)


def test_a_missing_weight_is_found_without_reading_weights(tmp_path: Path) -> None:
    save("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(LlmcError, match="WEIGHTS_MISSING"):
        plan(tmp_path)
