"""Printed programs are readable Python and compute what the program computes."""

from __future__ import annotations

import ast
import functools
import itertools
import operator
import re

import pytest
import torch
from check_pass import VOCAB, capture, inputs
from torch import Tensor, nn
from zoo.tiny import tiny_model

from llmc.compiler.frontend.capture import trace
from llmc.ir.printer import from_python, to_python
from llmc.ir.program import Program
from llmc.ir.stages import Stage
from llmc.ir.weights import constant
from llmc.passes.pipeline import bring_to

aten = torch.ops.aten


def rerun(program: Program, *sample: Tensor) -> Tensor:
    values = {name: weight.evaluate() for name, weight in program.weights.items()}
    return from_python(to_python(program))(values, *sample)[0]


# Real models --------------------------------------------------------------------------------------------------------


@functools.cache
def _captured(model_type: str) -> Program:
    return trace(tiny_model(model_type), {}, model_type, 32)


@functools.cache
def at_stage(model_type: str, stage: Stage) -> Program:
    return bring_to(_captured(model_type).copy(), stage)


STAGES = [Stage.CAPTURED, Stage.CANONICAL, Stage.OPTIMIZED]


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_printed_function_computes_what_the_program_computes(model_type: str, stage: Stage) -> None:
    program = at_stage(model_type, stage)
    ast.parse(to_python(program))
    for size in ((2, 9), (1, 1)):
        assert torch.equal(rerun(program, *inputs(*size)), program(*inputs(*size)))


@pytest.mark.parametrize("stage", STAGES)
def test_the_printed_program_is_readable(stage: Stage) -> None:
    text = to_python(at_stage("deepseek_v3", stage))
    assert text.startswith(f"# deepseek_v3, {stage}\ndef forward(weights, tokens, positions):\n")
    assert re.search(r"^    B = aten.sym_size.int\(\w+, 0\)$", text, re.M)
    assert re.search(r"^    S = aten.sym_size.int\(\w+, 1\)$", text, re.M)
    assert "# f32[B, S, 64]" in text and "i64[S*B, 1]" in text
    assert not re.search(r"\bs\d+\b|torch\.ops|_opset|<built-in", text)
    assert "    # model.layers.0.self_attn.q_a_proj\n" in text
    assert not re.search(r"\n\n\n|[ \t]\n", text)
    modules = re.findall(r"^    # (.+)$", text, re.M)
    assert all(module != after for module, after in itertools.pairwise(modules)), "a module is named twice in a row"


# Single lines -------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, 8)
        self.head = nn.Linear(8, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.relu(self.embed(tokens)))


@pytest.fixture
def program() -> Program:
    return _model().copy()


@functools.cache
def _model() -> Program:
    return capture(Model())


def printed_call(program: Program, target: object, *args: object, **kwargs: object) -> str:
    """Replace relu by a call and print it; `None` in `args` means relu's argument."""
    (relu,) = [n for n in program.nodes if n.name.startswith("relu")]
    call_args = [relu.args[0] if a is None else a for a in args]
    with program.graph.inserting_before(relu):
        new = program.call(target, *call_args, like=relu, **kwargs)  # type: ignore[arg-type]
    program.replace(relu, new)
    sample = inputs(2, 5)
    assert torch.equal(rerun(program, *sample).nan_to_num(), program(*sample).nan_to_num())
    (line,) = [line for line in to_python(program).splitlines() if line.strip().startswith(f"{new.name} = ")]
    return line.split(" = ", 1)[1].split("  # ")[0]


@pytest.mark.parametrize(
    ("target", "args", "kwargs", "expected"),
    [
        (aten.clamp.default, (None, 0.5), {}, "aten.clamp.default(embedding, 0.5)"),
        (aten.clamp.default, (None, float("-inf"), float("inf")), {}, "aten.clamp.default(embedding, -inf, inf)"),
        (aten.full_like.default, (None, float("nan")), {}, "aten.full_like.default(embedding, nan)"),
        (aten.flip.default, (None, [1]), {}, "aten.flip.default(embedding, [1])"),
        (
            aten.clone.default,
            (None,),
            {"memory_format": torch.contiguous_format},
            "aten.clone.default(embedding, memory_format=torch.contiguous_format)",
        ),
        (
            aten.zeros_like.default,
            (None,),
            {"dtype": torch.float32, "device": torch.device("cpu")},
            "aten.zeros_like.default(embedding, dtype=torch.float32, device=torch.device('cpu'))",
        ),
        (aten.gelu.default, (None,), {"approximate": "tanh"}, "aten.gelu.default(embedding, approximate='tanh')"),
    ],
)
def test_arguments_are_printed_as_python(
    program: Program, target: object, args: tuple[object, ...], kwargs: dict[str, object], expected: str
) -> None:
    assert printed_call(program, target, *args, **kwargs) == expected


def test_python_keywords_get_an_underscore(program: Program) -> None:
    (relu,) = [n for n in program.nodes if n.name.startswith("relu")]
    relu.name = "lambda"
    assert "    lambda_ = aten.relu.default(" in to_python(program)
    assert torch.equal(rerun(program, *inputs(2, 3)), program(*inputs(2, 3)))


@pytest.mark.parametrize("name", ["weights", "aten", "llmc", "torch", "inf", "B"])
def test_reserved_names_get_an_underscore(program: Program, name: str) -> None:
    (relu,) = [n for n in program.nodes if n.name.startswith("relu")]
    relu.name = name
    assert f"    {name}_ = aten.relu.default(" in to_python(program)
    assert torch.equal(rerun(program, *inputs(2, 3)), program(*inputs(2, 3)))


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (operator.mul, "{} * 3"),
        (operator.floordiv, "{} // 3"),
        (operator.mod, "{} % 3"),
        (operator.pow, "{} ** 3"),
        (operator.ge, "{} >= 3"),
        (torch.sym_max, "sym_max({}, 3)"),
    ],
)
def test_arithmetic_on_sizes_is_infix(program: Program, target: object, text: str) -> None:
    (relu,) = [n for n in program.nodes if n.name.startswith("relu")]
    with program.graph.inserting_before(relu):
        size = program.call(aten.sym_size.int, program.inputs[0], 1, like=relu)
        number = program.call(target, size, 3, like=relu)  # type: ignore[arg-type]
        scaled = program.call(aten.mul.Tensor, relu.args[0], number, like=relu)
    program.replace(relu, scaled)
    expected = re.escape(text).replace(r"\{\}", "S_?")
    assert re.search(rf"= {expected}$", to_python(program), re.M)
    assert torch.equal(rerun(program, *inputs(2, 5)), program(*inputs(2, 5)))


def test_a_negative_base_is_parenthesized(program: Program) -> None:
    (relu,) = [n for n in program.nodes if n.name.startswith("relu")]
    with program.graph.inserting_before(relu):
        size = program.call(aten.sym_size.int, program.inputs[0], 0, like=relu)
        number = program.call(operator.pow, -1, size, like=relu)
        scaled = program.call(aten.mul.Tensor, relu.args[0], number, like=relu)
    program.replace(relu, scaled)
    assert torch.equal(rerun(program, *inputs(2, 5)), program(*inputs(2, 5)))


def test_a_quote_in_a_weights_name_is_escaped(program: Program) -> None:
    (relu,) = [n for n in program.nodes if n.name.startswith("relu")]
    weight = program.add_weight('table "a"', constant(torch.ones(8), "table"), like=relu)
    with program.graph.inserting_before(relu):
        scaled = program.call(aten.mul.Tensor, relu.args[0], weight, like=relu)
    program.replace(relu, scaled)
    assert torch.equal(rerun(program, *inputs(2, 5)), program(*inputs(2, 5)))
