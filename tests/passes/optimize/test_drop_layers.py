"""A program without a layer is the model without it; models whose layers are no chain are refused."""

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
from llmc.passes.match.remove_no_ops import RemoveNoOps
from llmc.passes.optimize.drop_layers import DropLayers, find_layers
from llmc.passes.pipeline import engine_passes, optimizing_passes, run_passes

WIDTH = 16
NAMES = [f"model.layers.{i}" for i in range(4)]


def llama() -> PreTrainedModel:
    """Four layers, in which what comes of a token and where it stands matter."""
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
def test_it_is_the_model_without_them(program: Program, layers: tuple[int, ...]) -> None:
    made = program.copy()
    subject = DropLayers([NAMES[i] for i in layers])
    assert subject(made).matches == len(layers)
    tokens, positions = inputs(2, 9)
    with torch.no_grad():
        wanted = without(*layers)(tokens, use_cache=False).logits
    torch.testing.assert_close(made(tokens, positions), wanted, atol=1e-4, rtol=0)
    assert not torch.allclose(program(tokens, positions), wanted, atol=1e-2)
    assert [layer.name for layer in find_layers(made)] == [n for i, n in enumerate(NAMES) if i not in layers]
    assert not [name for name in made.weights if any(name.startswith(f"{NAMES[i]}.") for i in layers)]
    assert subject(made).matches == 0
    check_rerun(made)


def test_nothing_is_kept_for_them() -> None:
    made = llmc.capture(llama(), until=Stage.CAPTURED)
    run_passes(made, [*optimizing_passes(NAMES[1:3]), *engine_passes([], ring=True, fuse=True)])
    assert made.stage is Stage.CACHED and len(made.caches) == 2
    assert made.ops()["llmc.add_rms_norm"] == 4, "norms are fused across where they stood"


def test_fuel(program: Program) -> None:
    made = program.copy()
    assert DropLayers(NAMES[:2])(made, Fuel(1)).matches == 1
    assert [layer.name for layer in find_layers(made)] == [NAMES[0], *NAMES[2:]]


@pytest.mark.parametrize("model_type", ["gpt2", "bloom", "gemma3_text", "olmo2", "mixtral"])
def test_families(model_type: str) -> None:
    program = llmc.capture(tiny_model(model_type))
    layers = find_layers(program)
    assert len(layers) == 2 and layers[1].before is layers[0].after
    DropLayers([layers[0].name])(program)
    assert torch.isfinite(program(*inputs(2, 5))).all() and len(find_layers(program)) == 1


# What is no chain -----------------------------------------------------------------------------------------------------

Flow = Callable[["Stack", Tensor], Tensor]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4)

    def forward(self, x: Tensor, other: Tensor | None = None) -> tuple[Tensor, Tensor]:
        made = linear(x, self.weight)
        return x + made + (0 if other is None else other), made


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


def first_input_everywhere(m: Stack, x: Tensor) -> Tensor:
    """A second value comes in from outside: which one flows on is plain all the same."""
    return m.layers[1](m.layers[0](x)[0], 0.5 * x)[0]


def two_values_leave(m: Stack, x: Tensor) -> Tensor:
    x, made = m.layers[0](x)
    return m.layers[1](x)[0] + made


def side_by_side(m: Stack, x: Tensor) -> Tensor:
    return m.layers[0](x)[0] + m.layers[1](x)[0]


def something_between(m: Stack, x: Tensor) -> Tensor:
    return m.layers[1](2 * m.layers[0](x)[0])[0]


def two_come_in(m: Stack, x: Tensor) -> Tensor:
    return m.layers[1](m.layers[0](x, x.flip(-1))[0])[0]


def no_layers(m: Stack, x: Tensor) -> Tensor:
    return x.relu()


def captured(flow: Flow) -> Program:
    return capture(Stack(flow), first=[RemoveNoOps()], stage=Stage.CANONICAL)


@pytest.mark.parametrize("flow", [chain, first_input_everywhere])
def test_chains(flow: Flow) -> None:
    assert [layer.name for layer in find_layers(captured(flow))] == ["layers.0", "layers.1"]


@pytest.mark.parametrize(
    ("flow", "said"),
    [
        (two_values_leave, "of layers.0 is read behind it, not one value"),
        (side_by_side, "layers.1 does not turn what layers.0 gives into"),
        (something_between, "layers.1 does not turn what layers.0 gives into"),
        (two_come_in, "layers.0 does not turn one value into"),
        (no_layers, "no numbered layers"),
    ],
)
def test_no_chains(flow: Flow, said: str) -> None:
    with pytest.raises(LlmcError, match="LAYERS_NOT_A_CHAIN") as caught:
        DropLayers(["layers.0"])(captured(flow))
    assert said in caught.value.what
