"""Eager logits are those of transformers, with weights in memory and on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from check_pass import inputs
from zoo.tiny import tiny_model

from llmc.compiler.frontend.eager import eager_logits
from llmc.compiler.frontend.sources import find_source


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_logits_from_disk_equal_those_from_memory(tmp_path: Path, model_type: str) -> None:
    model = tiny_model(model_type)
    tokens = inputs(2, 19)[0]
    with torch.no_grad():
        want = model(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(eager_logits(model, {}, tokens), want, rtol=0, atol=1e-6)

    model.save_pretrained(tmp_path)
    source = find_source(tmp_path)
    module = source.build(torch.float32)
    assert all(parameter.is_meta for parameter in module.parameters())
    got = eager_logits(module, source.weights(module), tokens)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert all(parameter.is_meta for parameter in module.parameters())


def test_logits_of_a_half_precision_model_are_float32() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    tokens = inputs(1, 7)[0]
    with torch.no_grad():
        want = model(input_ids=tokens, use_cache=False).logits
    got = eager_logits(model, {}, tokens)
    assert got.dtype == torch.float32 and torch.equal(got, want.float())
