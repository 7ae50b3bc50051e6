"""Hooks: rules of masks, refusals of unknown arguments, and undone patches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import masking_utils
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from zoo.tiny import tiny_model

from llmc import LlmcError
from llmc.compiler.frontend.capture import trace
from llmc.compiler.frontend.hooks import NAME, Attention, capturing, mask_rule
from llmc.kernels.ops import moe
from llmc.kernels.ops.attention_mask import MaskRule

NO_PADDING = torch.zeros(1, dtype=torch.long)


def call_hook(registry: Any, *arguments: Any, **options: Any) -> Any:
    """Call the function that `capturing` adds to a registry of transformers."""
    with capturing(tiny_model("llama"), 64):
        return registry[NAME](*arguments, **options)


@pytest.mark.parametrize(
    ("function", "rule"),
    [
        (masking_utils.causal_mask_function, MaskRule(causal=True)),
        (masking_utils.bidirectional_mask_function, MaskRule(causal=False)),
        (masking_utils.sliding_window_causal_mask_function(5), MaskRule(causal=True, window=5)),
        (masking_utils.sliding_window_causal_mask_function(64), MaskRule(causal=True)),
        (masking_utils.chunked_causal_mask_function(5, NO_PADDING), MaskRule(causal=True, chunk=5)),
    ],
)
def test_a_mask_function_becomes_a_rule(function: Any, rule: MaskRule) -> None:
    assert mask_rule(function, 64) == rule


def prefix(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return (key <= query) | (key < 3)


def widening(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return (key <= query) & (key > query - 5 - (query > 60).long())


@pytest.mark.parametrize("function", [prefix, widening, masking_utils.sliding_window_bidirectional_mask_function(5)])
def test_a_mask_function_without_a_rule_is_refused(function: Any) -> None:
    with pytest.raises(LlmcError) as refused:
        mask_rule(function, 64)
    assert refused.value.code == "MASK_UNKNOWN"


def test_a_mask_without_a_rule_is_refused_when_a_layer_uses_it() -> None:
    mask = call_hook(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS, mask_function=prefix)
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(LlmcError) as refused:
        call_hook(ALL_ATTENTION_FUNCTIONS, nn.Module(), q, q, q, mask)
    assert refused.value.code == "MASK_UNKNOWN"


@pytest.mark.parametrize("extra", [{"block_indices": torch.zeros(1)}, {"temperature": 2.0}])
def test_an_unknown_argument_of_attention_is_refused(extra: dict[str, Any]) -> None:
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(LlmcError, match=next(iter(extra))) as refused:
        call_hook(ALL_ATTENTION_FUNCTIONS, nn.Module(), q, q, q, None, **extra)
    assert refused.value.code == "ATTENTION_UNKNOWN"


def test_a_mask_tensor_is_refused() -> None:
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(LlmcError, match="mask tensor") as refused:
        call_hook(ALL_ATTENTION_FUNCTIONS, nn.Module(), q, q, q, torch.zeros(3, 3))
    assert refused.value.code == "ATTENTION_UNKNOWN"


def test_attention_without_a_mask_follows_the_modules_is_causal() -> None:
    q = torch.randn(1, 2, 5, 4)
    module = nn.Module()
    for is_causal in (True, False):
        module.is_causal = is_causal  # type: ignore[assignment]
        out, _ = call_hook(ALL_ATTENTION_FUNCTIONS, module, q, q, q, None, scaling=0.5)
        want = nn.functional.scaled_dot_product_attention(q, q, q, is_causal=is_causal, scale=0.5)
        torch.testing.assert_close(out, want.transpose(1, 2))
        assert out.is_contiguous()


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("mixtral", {"act": "silu", "alpha": 1.0, "limit": None, "offset": 0.0}),
        ("gpt_oss", {"act": "silu", "alpha": 1.702, "limit": 0.5, "offset": 1.0}),
    ],
)
def test_the_activation_of_experts_is_found(model_type: str, expected: dict[str, Any]) -> None:
    program = trace(tiny_model(model_type), {}, model_type, 64)
    calls = [moe.bind(n.args, dict(n.kwargs)) for n in program.nodes if n.target is moe.overload]
    assert calls
    for call in calls:
        assert {name: call[name] for name in expected} == expected


def test_an_unknown_activation_of_experts_is_refused() -> None:
    experts = SimpleNamespace(
        has_gate=True,
        has_bias=False,
        is_transposed=False,
        gate_up_proj=torch.ones(2, 4, 3),
        down_proj=torch.ones(2, 3, 2),
        _apply_gate=lambda x: (x[..., :2] + x[..., 2:]).sinh(),
    )
    hidden, ids, weights = torch.ones(5, 3), torch.zeros(5, 1, dtype=torch.long), torch.ones(5, 1)
    with pytest.raises(LlmcError) as refused:
        call_hook(ALL_EXPERTS_FUNCTIONS, experts, hidden, ids, weights)
    assert refused.value.code == "EXPERTS_UNKNOWN"


def state(model: nn.Module) -> dict[str, Any]:
    return {
        "registries": [dict(r._global_mapping) for r in (ALL_ATTENTION_FUNCTIONS, ALL_EXPERTS_FUNCTIONS)],
        "masks": dict(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping),
        "functions": [masking_utils.find_packed_sequence_indices, masking_utils.chunked_overlay],
        "config": [model.config._attn_implementation, model.config._experts_implementation],
        "parameters": {name: id(p) for name, p in model.named_parameters()},
        "training": model.training,
    }


@pytest.mark.parametrize("model_type", ["llama", "gptj", "dbrx"], ids=["hooked", "eager", "refused"])
def test_all_patches_are_undone(model_type: str) -> None:
    model = tiny_model(model_type).train()
    before = state(model)
    try:
        trace(model, {}, model_type, 64)
    except LlmcError:
        assert model_type == "dbrx"
    else:
        assert model_type != "dbrx"
    assert state(model) == before


def test_eager_attention_leaves_experts_hooked() -> None:
    model = tiny_model("mixtral")
    with capturing(model, 64, Attention.EAGER):
        assert model.config._attn_implementation == "eager"
        assert model.config._experts_implementation == NAME
