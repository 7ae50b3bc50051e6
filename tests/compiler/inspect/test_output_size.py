"""Predicted weight sizes equal the sizes after quantization."""

from __future__ import annotations

import pytest
import torch
from schemes import SCHEMES
from torch import Tensor, nn
from zoo.tiny import tiny_model

import llmc
from llmc.compiler.inspect.output_size import output_bytes
from llmc.compiler.targets.ort.facts import FACTS
from llmc.ir.program import Program
from llmc.ir.stages import Stage
from llmc.passes.pipeline import bring_to
from llmc.passes.quantize.quantization_plan import analyse
from llmc.passes.quantize.quantize import Quantize


class Model(nn.Module):
    """An embedding of 10 tokens, a linear layer, and an LM head for 50 tokens.

    The hidden size is 128, and the LM head has a bias.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 128)
        self.layers = nn.ModuleList([nn.Linear(128, 128, bias=False)])
        self.head = nn.Linear(128, 50)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers[0](self.embed(tokens)))


def size_of(program: Program) -> int:
    """Bytes of the program's weights, with floats as float32."""
    return sum(weight.nbytes for weight in program.weights.values() if not weight.is_constant)


def test_the_size_of_each_scheme_is_the_sum_of_its_parts() -> None:
    layer, wide, bias = 128 * 128, 60 * 128, 50
    by_128 = wide + 60 * 4 + bias * 4
    low = by_128 + layer // 2 + 128 * 4 + 128 * 4 + 128 * 4  # per group: codes, a scale, a multiple and a zero point
    program = llmc.capture(Model(), until=Stage.CANONICAL)
    assert FACTS.promotion is not None
    assert output_bytes(program, FACTS) == {
        "fp32": 4 * (layer + wide + bias),
        "bf16": 2 * (layer + wide + bias),
        "int8": by_128 + layer + 128 * 4,
        "int4": low + round(FACTS.promotion.share * (layer + 128 * 4 + by_128 - low)),
        "int4 --raise 0": low,
    }


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize(("scheme", "entry"), [("int8", "int8"), ("int4", "int4 --raise 0")])
def test_a_quantized_model_has_the_predicted_size(name: str, scheme: str, entry: str) -> None:
    program = llmc.capture(tiny_model(name), until=Stage.CANONICAL)
    predicted = output_bytes(program, FACTS)[entry]
    bring_to(program, Stage.OPTIMIZED)
    Quantize(analyse(program, SCHEMES[scheme]))(program)
    assert size_of(program) == predicted
