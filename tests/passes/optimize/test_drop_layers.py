"""DropLayers gives the model without these layers, and refuses other models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from check_pass import VOCAB, capture, check_rerun, inputs
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from zoo.tiny import tiny_model

import llmc
from llmc.errors import LlmcError
from llmc.ir.program import Program
from llmc.ir.stages import Stage
from llmc.kernels.ops import embedding, linear
from llmc.passes.base import Fuel
from llmc.passes.cache.fuse_attention import FuseAttention
from llmc.passes.match.remove_no_ops import RemoveNoOps
from llmc.passes.optimize.drop_layers import DropLayers, find_layers
from llmc.passes.pipeline import caching_passes, optimizing_passes
from llmc.passes.runner import Runner

WIDTH = 16
NAMES = [f"model.layers.{i}" for i in range(4)]


def llama() -> PreTrainedModel:
    """A model of four layers whose outputs depend on token ids and positions."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def program() -> Program:
    return llmc.capture(llama())


def without(*layers: int) -> PreTrainedModel:
    model = llama()
    for layer in sorted(layers, reverse=True):
        del model.model.layers[layer]
    for place, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = place
    return model


@pytest.mark.parametrize("layers", [(0,), (1,), (3,), (1, 2), (0, 1, 3)])
def test_equals_the_model_without_the_layers(program: Program, layers: tuple[int, ...]) -> None:
    result = program.copy()
    subject = DropLayers([NAMES[i] for i in layers])
    assert subject(result).matches == len(layers)
    tokens, positions = inputs(2, 9)
    with torch.no_grad():
        wanted = without(*layers)(tokens, use_cache=False).logits
    torch.testing.assert_close(result(tokens, positions), wanted, atol=1e-4, rtol=0)
    assert not torch.allclose(program(tokens, positions), wanted, atol=1e-2)
    assert [layer.name for layer in find_layers(result)] == [n for i, n in enumerate(NAMES) if i not in layers]
    assert not [name for name in result.weights if any(name.startswith(f"{NAMES[i]}.") for i in layers)]
    assert subject(result).matches == 0
    check_rerun(result)


def test_dropped_layers_get_no_caches() -> None:
    result = llmc.capture(llama(), until=Stage.CAPTURED)
    Runner().run(result, [*optimizing_passes(NAMES[1:3]), *caching_passes(), FuseAttention(8)])
    assert result.stage is Stage.CACHED and len(result.caches) == 2
    assert result.ops()["llmc.add_rms_norm"] == 4, "norms are fused across the dropped layers"


def test_fuel(program: Program) -> None:
    result = program.copy()
    assert DropLayers(NAMES[:2])(result, Fuel(1)).matches == 1
    assert [layer.name for layer in find_layers(result)] == [NAMES[0], *NAMES[2:]]


@pytest.mark.parametrize("model_type", ["gpt2", "bloom", "gemma3_text", "olmo2", "mixtral"])
def test_families(model_type: str) -> None:
    program = llmc.capture(tiny_model(model_type))
    layers = find_layers(program)
    assert len(layers) == 2 and layers[1].before is layers[0].after
    DropLayers([layers[0].name])(program)
    assert torch.isfinite(program(*inputs(2, 5))).all() and len(find_layers(program)) == 1


# Layers that do not form a chain --------------------------------------------------------------------------------------

Flow = Callable[["Stack", Tensor], Tensor]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4)

    def forward(self, x: Tensor, other: Tensor | None = None) -> tuple[Tensor, Tensor]:
        product = linear(x, self.weight)
        return x + product + (0 if other is None else other), product


class Stack(nn.Module):
    def __init__(self, flow: Flow, narrow: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Parameter(torch.randn(VOCAB, WIDTH))
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Parameter(torch.randn(VOCAB, WIDTH))
        self.flow = flow

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return linear(self.flow(self, embedding(tokens, self.embed)), self.head)


def chain(m: Stack, x: Tensor) -> Tensor:
    x, _ = m.layers[0](x)
    return m.layers[1](x)[0]


def an_input_from_outside(m: Stack, x: Tensor) -> Tensor:
    """The second layer has a second input, which no layer computed."""
    return m.layers[1](m.layers[0](x)[0], 0.5 * x)[0]


def two_outputs(m: Stack, x: Tensor) -> Tensor:
    x, product = m.layers[0](x)
    return m.layers[1](x)[0] + product


def parallel_layers(m: Stack, x: Tensor) -> Tensor:
    return m.layers[0](x)[0] + m.layers[1](x)[0]


def an_op_between_layers(m: Stack, x: Tensor) -> Tensor:
    return m.layers[1](2 * m.layers[0](x)[0])[0]


def two_inputs(m: Stack, x: Tensor) -> Tensor:
    return m.layers[1](m.layers[0](x, x.flip(-1))[0])[0]


def no_layers(m: Stack, x: Tensor) -> Tensor:
    return x.relu()


def captured(flow: Flow) -> Program:
    return capture(Stack(flow), first=[RemoveNoOps()], stage=Stage.CANONICAL)


@pytest.mark.parametrize("flow", [chain, an_input_from_outside])
def test_chains(flow: Flow) -> None:
    assert [layer.name for layer in find_layers(captured(flow))] == ["layers.0", "layers.1"]


@pytest.mark.parametrize(
    ("flow", "message"),
    [
        (two_outputs, "layers.0 must have exactly one output, but later ops use"),
        (parallel_layers, "layers.1 does not map the output of layers.0 to"),
        (an_op_between_layers, "layers.1 does not map the output of layers.0 to"),
        (two_inputs, "layers.0 does not map exactly one input to"),
        (no_layers, "no numbered layers"),
    ],
)
def test_other_layers_are_refused(flow: Flow, message: str) -> None:
    with pytest.raises(LlmcError, match="LAYERS_NOT_A_CHAIN") as caught:
        DropLayers(["layers.0"])(captured(flow))
    assert message in caught.value.what
