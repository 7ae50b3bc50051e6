"""UnmergeLinears makes a linear of each part of a merged one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from check_pass import VOCAB, capture, check_pass
from schemes import scheme as make_scheme
from torch import Tensor, nn

from llmc.ir.program import Program
from llmc.ir.stages import Stage
from llmc.kernels.ops import embedding, linear
from llmc.passes.match.unify_op_names import UnifyOpNames
from llmc.passes.optimize.unmerge_linears import UnmergeLinears
from llmc.passes.quantize.quantization_plan import analyse
from llmc.passes.quantize.quantize import Quantize
from llmc.passes.quantize.quantize_activations import QuantizeActivations
from llmc.passes.quantize.schemes import Grid

HIDDEN, WIDE = 32, 24


class Merged(nn.Module):
    """A linear whose output `join` splits into two unequal parts and combines again."""

    def __init__(self, join: Callable[[Tensor], Tensor], bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(VOCAB, HIDDEN)
        self.both = nn.Linear(HIDDEN, 3 * WIDE, bias=bias)
        self.head = nn.Linear(WIDE, VOCAB)
        self.join = join

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = embedding(input_ids, self.table.weight)
        return linear(self.join(linear(x, self.both.weight, self.both.bias)), self.head.weight)


def combine_parts(x: Tensor) -> Tensor:
    one, other = torch.split(x, [WIDE, 2 * WIDE], -1)
    return one * other.unflatten(-1, (2, WIDE)).sum(-2)


GRIDS = {
    "int8": Grid("int8"),
    "int8 in groups": Grid("int8", 16),
    "int4": Grid("int4", 16),
    "int4 with zeros": Grid("int4", 16, symmetric=False),
    "fp8": Grid("fp8", activation="fp8"),
    "nf4": Grid("nf4", 16),
}


def quantized(join: Callable[[Tensor], Tensor], name: str, bias: bool = False) -> Program:
    program = capture(Merged(join, bias), first=[UnifyOpNames()], stage=Stage.OPTIMIZED)
    Quantize(analyse(program, make_scheme(name, GRIDS[name])))(program)
    program.stage = Stage.CACHED
    QuantizeActivations()(program)
    return program


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scheme", GRIDS)
def test_each_part_becomes_a_linear(scheme: str, bias: bool) -> None:
    before = quantized(combine_parts, scheme, bias)
    after = check_pass(UnmergeLinears(), before, matches=1, gone={"aten.split_with_sizes"})
    assert after.ops()["llmc.quant_linear"] == before.ops()["llmc.quant_linear"] + 1


@pytest.mark.parametrize("part", ["codes", "scales", "zeros", "multiples"])
def test_parts_are_slices_of_the_merged_weight(part: str) -> None:
    before = quantized(combine_parts, "int4 with zeros")
    (name,) = [name for name in before.weights if "both" in name and name.endswith(part)]
    merged = before.weights[name].evaluate()
    UnmergeLinears()(before)
    parts = [weight for name, weight in before.weights.items() if part in name and "both" in name]
    slices = [weight.evaluate() for weight in sorted(parts, key=lambda weight: weight.shape)]
    assert torch.equal(torch.cat(slices), merged)


def combine_slices(x: Tensor) -> Tensor:
    return x[..., :WIDE] * x[..., WIDE : 2 * WIDE] + x[..., 2 * WIDE :]


def combine_chunks(x: Tensor) -> Tensor:
    one, two, three = x.chunk(3, -1)
    return one * two + three


def combine_thirds(x: Tensor) -> Tensor:
    one, two, three = x.split(WIDE, -1)
    return one * two + three


@pytest.mark.parametrize(
    ("join", "op"), [(combine_slices, "aten.slice"), (combine_chunks, "aten.chunk"), (combine_thirds, "aten.split")]
)
@pytest.mark.parametrize("scheme", ["int8", "int4 with zeros"])
def test_chunks_and_slices_are_parts_too(join: Callable[[Tensor], Tensor], op: str, scheme: str) -> None:
    before = quantized(join, scheme, bias=True)
    assert op in before.ops()
    after = check_pass(UnmergeLinears(), before, matches=1, gone={op})
    assert after.ops()["llmc.quant_linear"] == before.ops()["llmc.quant_linear"] + 2


def test_the_widths_of_the_parts_are_asked_about() -> None:
    asked = []
    subject = UnmergeLinears(lambda node, widths: asked.append(list(widths)) or len(widths) > 2)  # type: ignore[func-returns-value]
    check_pass(subject, quantized(combine_parts, "int8"), matches=0)
    check_pass(subject, quantized(combine_thirds, "int8"), matches=1)
    assert [WIDE, 2 * WIDE] in asked and [WIDE] * 3 in asked


def test_channels_that_nothing_reads_are_left_out() -> None:
    before = quantized(lambda x: x[..., WIDE : 2 * WIDE] * 2, "int8")
    after = check_pass(UnmergeLinears(), before, matches=1, gone={"aten.slice"})
    shapes = [tuple(weight.shape) for name, weight in after.weights.items() if "both" in name]
    assert (WIDE, HIDDEN) in shapes


def between_heads(x: Tensor) -> Tensor:
    one, other = torch.split(x.unflatten(-1, (3, WIDE)), [1, 2], 2)
    return one.squeeze(2) + other.sum(2)


def along_tokens(x: Tensor) -> Tensor:
    return torch.cat(torch.split(x, [1, x.shape[1] - 1], 1), 1)[..., :WIDE]


LEFT_ALONE = {
    "1. another dim": (along_tokens, "another dim"),
    "4. slices overlap": (lambda x: x[..., :WIDE] + x[..., 1 : WIDE + 1], "overlap"),
    "4. slices have steps": (lambda x: x[..., ::3] + 1, "have steps"),
    "3. the merged output is used": (
        lambda x: combine_parts(x) + x.sin()[..., :WIDE],
        "the merged output has other users",
    ),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_other_splits_are_left_alone(name: str) -> None:
    join, reason = LEFT_ALONE[name]
    check_pass(UnmergeLinears(), quantized(join, "int8"), matches=0, miss=reason)


def test_2_a_split_of_a_reshape_is_left_alone() -> None:
    check_pass(UnmergeLinears(), quantized(between_heads, "int8"), matches=0)
