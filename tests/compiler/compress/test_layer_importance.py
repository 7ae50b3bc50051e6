"""Layer importance, compared with the hidden states of the model itself."""

from __future__ import annotations

import torch
from check_pass import inputs
from zoo.tiny import tiny_model

import llmc
from llmc.compiler.compress.layer_importance import importance
from llmc.passes.optimize.drop_layers import find_layers

TOKENS = inputs(5, 40)[0]


def test_it_is_one_minus_the_cosine_of_hidden_states() -> None:
    model = tiny_model("llama")
    program = llmc.capture(model)
    layers = find_layers(program)
    states = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, inputs, output: states.append((inputs[0], output)))
    with torch.no_grad():
        model(TOKENS, use_cache=False)
    assert len(states) == len(layers) == 2
    expected = [
        1 - torch.cosine_similarity(x.double(), (y[0] if isinstance(y, tuple) else y).double(), dim=-1).mean()
        for x, y in states
    ]
    actual = importance(program, layers, TOKENS)
    torch.testing.assert_close(actual, torch.stack(expected), atol=1e-6, rtol=1e-5)
    assert actual.min() > 0.05 and abs(actual[0] - actual[1]) > 0.05


def test_a_layer_that_does_nothing() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    program = llmc.capture(model)
    actual = importance(program, find_layers(program), TOKENS)
    assert abs(float(actual[1])) < 1e-6 < actual[0]


def test_the_mean_is_over_all_batches() -> None:
    """More tokens than one batch holds."""
    program = llmc.capture(tiny_model("llama"))
    layers, tokens = find_layers(program), inputs(60, 40)[0]
    actual = importance(program, layers, tokens)
    halves = [importance(program, layers, half) for half in tokens.split(30)]
    torch.testing.assert_close(actual, torch.stack(halves).mean(0), atol=1e-6, rtol=0)
    seen: list[tuple[int, int]] = []
    importance(program, layers, TOKENS, lambda *step: seen.append(step))
    assert seen == [(0, 2), (1, 2), (2, 2)]
