"""The tiny models have valid configs, nontrivial weights, and run causally."""

from __future__ import annotations

import inspect

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from zoo.facts import UNBUILDABLE
from zoo.tiny import forward_ok, model_class, tiny_config, tiny_model, tiny_model_types

# Window; sinks and experts; alibi; latent attention; an encoder run as a decoder; the decoder of an encoder-decoder
# pair; a recurrent state; a composite config.
REPRESENTATIVE = ["mistral", "gpt_oss", "bloom", "deepseek_v3", "bert", "bart", "jamba", "gemma3"]


@pytest.mark.parametrize("model_type", REPRESENTATIVE)
def test_a_tiny_model_runs_and_is_causal(model_type: str) -> None:
    model = tiny_model(model_type)
    forward = forward_ok(model_type, model)
    assert forward.causal
    assert 0.3 < forward.logits.std() < 3
    assert sum(p.numel() for p in model.parameters()) < 500_000
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training


@pytest.mark.parametrize("model_type", REPRESENTATIVE)
def test_no_parameter_is_trivial(model_type: str) -> None:
    tensors = {name: t for name, t in tiny_model(model_type).state_dict().items() if t.is_floating_point()}
    assert not [name for name, t in tensors.items() if t.numel() > 1 and t.unique().numel() < t.numel() // 2]


def test_weights_are_reproducible_and_the_global_seed_is_kept() -> None:
    torch.manual_seed(1)
    first, before = tiny_model("mamba").state_dict(), torch.random.get_rng_state()
    torch.manual_seed(2)
    second = tiny_model("mamba").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.manual_seed(1)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("model_type", "attribute", "other"),
    [
        ("mistral", "sliding_window", 100),
        ("gemma2", "attn_logit_softcapping", 50.0),
        ("llama4_text", "attention_chunk_size", 100),
        ("gpt_oss", "swiglu_limit", 7.0),
        ("deepseek_v32", "index_topk", 100),
        ("granite", "residual_multiplier", 1.0),
    ],
)
def test_ignoring_a_feature_changes_the_logits(model_type: str, attribute: str, other: float) -> None:
    model, config = tiny_model(model_type), tiny_config(model_type)
    setattr(config, attribute, other)
    without = model_class(model_type)._from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    without.load_state_dict(model.state_dict())
    logits = [forward_ok(model_type, m).logits for m in (model, without)]
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_every_type_has_a_config_with_all_its_kinds_of_layers_or_a_reason() -> None:
    for model_type in tiny_model_types():
        if UNBUILDABLE.get(model_type):
            continue
        config = tiny_config(model_type)
        text = config.get_text_config(decoder=True)
        assert text.vocab_size <= 96, model_type
        depth = getattr(text, "num_hidden_layers", 2)  # blt has separate counts for its four parts
        assert 2 <= depth <= (16 if model_type == "hrm_text" else 4), model_type  # hrm_text repeats few layers
        default = CONFIG_MAPPING[model_type]().get_text_config(decoder=True)
        for kinds in ("layer_types", "mlp_layer_types"):
            missing = set(getattr(default, kinds, None) or ()) - set(getattr(text, kinds, None) or ())
            assert not missing, f"{model_type}: {missing}"


def test_draft_heads_need_the_target_models_states() -> None:
    for model_type in {"gemma4_assistant", "gemma4_unified_assistant"} & set(tiny_model_types()):
        assert "shared_kv_states" in inspect.signature(model_class(model_type).forward).parameters
