"""SelectLogits computes logits only for the tokens that the caller selects."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attending import Attending, cached, join, qkv
from check_pass import ROWS, VOCAB, capture, check_pass, samples
from schemes import SCHEMES
from torch import Tensor, nn

from llmc.ir.program import Program
from llmc.ir.signature import Signature
from llmc.ir.stages import Stage
from llmc.kernels.ops import attention, embedding, linear
from llmc.passes.base import Fuel, PassResult
from llmc.passes.cache.select_logits import SelectLogits
from llmc.passes.match.remove_no_ops import RemoveNoOps
from llmc.passes.quantize.quantization_plan import analyse
from llmc.passes.quantize.quantize import Quantize

aten = torch.ops.aten
WIDTH = 8
Head = Callable[["Model", Tensor], Tensor]


class Model(nn.Module):
    """An embedding, a running sum, by which tokens differ, and `head(model, x)`."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)
        self.factor = nn.Parameter(torch.rand(VOCAB) + 0.5)
        self.compute = head

    def forward(self, tokens: Tensor) -> Tensor:
        return self.compute(self, embedding(tokens, self.embed.weight).cumsum(1))


def model(head: Head) -> Program:
    return as_cached(capture(Model(head), first=[RemoveNoOps()]))


def as_cached(program: Program) -> Program:
    """Give a program without attention the stage and the inputs of one with caches."""
    tokens, positions = program.tokens, program.positions
    with program.fake_mode:
        starts = torch.empty(tokens.meta["val"].shape[0], dtype=torch.int64)
    program.add_input("starts", starts, after=tokens)
    program.graph.erase_node(positions)
    program.signature = Signature("tokens", positions=None, starts="starts")
    program.stage = Stage.CACHED
    return program


def project(m: Model, x: Tensor) -> Tensor:
    return linear(x, m.head.weight, m.head.bias)


SELECTED: dict[str, Head] = {
    "the head": project,
    "scaled": lambda m, x: project(m, x) * 0.125,
    "divided": lambda m, x: project(m, x) / 8,
    "capped": lambda m, x: torch.tanh(project(m, x) / 30.0) * 30.0,
    "widened": lambda m, x: project(m, x).double(),
    "in lower precision": lambda m, x: project(m, x).to(torch.bfloat16).float(),
    "without a bias": lambda m, x: linear(x, m.embed.weight),
}


def select(logits: Tensor) -> Tensor:
    return logits[:, list(ROWS)]


@pytest.mark.parametrize("name", SELECTED)
def test_the_head_gets_selected_tokens(name: str) -> None:
    program = check_pass(SelectLogits(), model(SELECTED[name]), matches=1, there={"llmc.take_rows"}, expected=select)
    (head,) = [n for n in program.nodes if "linear" in str(n.target)]
    assert "take_rows" in str(head.args[0].target)


def test_the_caller_chooses_the_number_of_tokens() -> None:
    program = model(SELECTED["capped"])
    all_logits = program(*samples(program, 2, 5))
    SelectLogits()(program)
    batch, length = map(str, program.inputs[0].meta["val"].shape)
    assert str(program.output.meta["val"].shape[1]) not in (batch, length, "1")
    tokens, starts, _ = samples(program, 2, 5)
    for wanted in ([-1], [0, 1, 2, 3, 4], [2, 2], [0, 1, 2, 3, 4, -1, -2]):
        torch.testing.assert_close(program(tokens, starts, torch.tensor(wanted)), all_logits[:, wanted])


def attend(m: Attending, place: int, x: Tensor, positions: Tensor) -> Tensor:
    return join(attention(*qkv(m, place, x), 0.4))


def test_caches_are_unchanged() -> None:
    program = check_pass(SelectLogits(), cached(attend), matches=1, expected=select)
    names = [str(node.target) for node in program.inputs]
    assert names[:3] == ["tokens", "starts", "rows"] and len(names) == 7


def test_a_quantized_head() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.head = nn.Embedding(VOCAB, 32), nn.Linear(32, VOCAB)

        def forward(self, tokens: Tensor) -> Tensor:
            return linear(embedding(tokens, self.embed.weight).cumsum(1), self.head.weight)

    program = capture(Wide(), first=[RemoveNoOps()], stage=Stage.OPTIMIZED)
    Quantize(analyse(program, SCHEMES["int8"]))(program)
    program = check_pass(SelectLogits(), as_cached(program), matches=1, expected=select)
    assert program.ops()["llmc.quant_linear"] == 1


def test_nothing_is_done_without_fuel() -> None:
    program = model(project)
    assert SelectLogits()(program, Fuel(0)) == PassResult(0)
    assert not program.ops()["llmc.take_rows"]


LEFT: dict[str, tuple[Head, str]] = {
    "1. no linear": (lambda m, x: x.repeat(1, 1, 4)[..., :VOCAB], "don't come from a linear"),
    "1. a factor for each logit": (lambda m, x: project(m, x) * m.factor, "don't come from a linear"),
    "1. a mean of all tokens": (lambda m, x: project(m, x).cumsum(1), "don't come from a linear"),
    "1. tokens in reverse order": (lambda m, x: project(m, x).flip(1) * 2, "don't come from a linear"),
    "2. two users": (lambda m, x: project(m, x) + project(m, x).mean(1, True), "don't come from a linear"),
    "2. two users of scaled logits": (
        lambda m, x: (lambda y: (y * 2).tanh() + y)(project(m, x)),
        "don't come from a linear",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_other_heads_are_left_alone(name: str) -> None:
    head, reason = LEFT[name]
    check_pass(SelectLogits(), model(head), matches=0, gone={"llmc.take_rows"}, miss=reason)


@pytest.mark.parametrize(("also", "reason"), [("linear", "has other users"), ("tanh", "don't come from a linear")])
def test_logits_are_left_alone_if_a_value_before_them_is_an_output(also: str, reason: str) -> None:
    program = model(SELECTED["capped"])
    (other,) = [n for n in program.nodes if also in str(n.target)]
    (end,) = program.graph.find_nodes(op="output")
    end.args = ((program.output, other),)
    before = program(*samples(program, 2, 5))
    (only,) = SelectLogits()(program).misses
    assert reason in only.reason
    assert torch.equal(program(*samples(program, 2, 5)), before)
