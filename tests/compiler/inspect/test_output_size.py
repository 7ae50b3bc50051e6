"""What a plan foretells of an artifact's size is what rounding gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from zoo.tiny import tiny_model

import llmc
from llmc.compiler.compress.quantization import RAISE_SHARE
from llmc.compiler.inspect.output_size import output_bytes
from llmc.ir.program import Program
from llmc.ir.stages import Stage
from llmc.passes.pipeline import run_pipeline
from llmc.passes.quantize.quantize import Quantize
from llmc.passes.quantize.rounding_plan import SCHEMES_BY_NAME, analyse


class Model(nn.Module):
    """An embedding of 10 rows, a layer and a head of 50 with a bias, all of 128 inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 128)
        self.layers = nn.ModuleList([nn.Linear(128, 128, bias=False)])
        self.head = nn.Linear(128, 50)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers[0](self.embed(tokens)))


def size_of(program: Program) -> int:
    """Bytes of what is left to read, floats as float32."""
    return sum(weight.nbytes for weight in program.weights.values() if not weight.is_constant)


def test_each_scheme_has_the_parts_of_its_grid() -> None:
    layer, wide, bias = 128 * 128, 60 * 128, 50
    by_128 = wide + 60 * 4 + bias * 4
    low = by_128 + layer // 2 + 128 * 4 + 128 * 4 + 128 * 4  # codes, scales, a multiple and a zero point a group
    program = llmc.capture(Model(), until=Stage.CANONICAL)
    assert output_bytes(program) == {
        "fp32": 4 * (layer + wide + bias),
        "bf16": 2 * (layer + wide + bias),
        "int8": by_128 + layer + 128 * 4,
        "int4": low + round(RAISE_SHARE * (layer + 128 * 4 + by_128 - low)),
        "int4 --raise 0": low,
    }


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize(("scheme", "row"), [("int8", "int8"), ("int4", "int4 --raise 0")])
def test_a_model_comes_to_what_was_foretold(name: str, scheme: str, row: str) -> None:
    program = llmc.capture(tiny_model(name), until=Stage.CANONICAL)
    foretold = output_bytes(program)[row]
    run_pipeline(program, Stage.OPTIMIZED)
    Quantize(analyse(program, SCHEMES_BY_NAME[scheme]))(program)
    assert size_of(program) == foretold
