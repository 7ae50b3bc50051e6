"""UnifyOpNames replaces alternative names of ops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from check_pass import VOCAB, check_pass
from torch import Tensor, nn

from llmc.passes.match.unify_op_names import NAMES, UnifyOpNames


class Computed(nn.Module):
    def __init__(self, compute: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8)
        self.head = nn.Linear(8, VOCAB)
        self.compute = compute

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.compute(self.embed(tokens)))


@pytest.mark.parametrize(
    ("compute", "gone", "there"),
    [
        (lambda x: torch.multiply(x, x), "multiply", "mul"),
        (lambda x: torch.subtract(x, x.sin(), alpha=2), "subtract", "sub"),
        (lambda x: torch.divide(x, 3.0), "divide", "div"),
        (lambda x: torch.true_divide(x, x.exp()), "true_divide", "div"),
        (lambda x: torch.concat([x[..., :4], x[..., 4:].sin()], dim=-1), "concat", "cat"),
        (lambda x: x.moveaxis(-1, 1).sin().moveaxis(1, -1), "moveaxis", "movedim"),
        (lambda x: torch.clip(x, -0.5, 0.5), "clip", "clamp"),
        (lambda x: torch.where(torch.greater(x, 0.1), x, x.sin()), "greater", "gt"),
        (lambda x: torch.where(torch.less_equal(x, x.sin()), x, 2 * x), "less_equal", "le"),
        (lambda x: torch.negative(x), "negative", "neg"),
    ],
)
def test_replaces_alternative_names(compute: Callable[[Tensor], Tensor], gone: str, there: str) -> None:
    matches = 2 if gone == "moveaxis" else 1
    check_pass(UnifyOpNames(), Computed(compute), matches=matches, gone={f"aten.{gone}"}, there={f"aten.{there}"})


@pytest.mark.parametrize(("other", "name"), sorted(NAMES.items()))
def test_both_names_have_the_same_schemas(other: str, name: str) -> None:
    replaced, kept = getattr(torch.ops.aten, other), getattr(torch.ops.aten, name)
    for overload in replaced.overloads():
        if overload.endswith("out") or overload.startswith("names"):
            continue  # it writes into an argument or uses named dims; neither can be captured
        arguments = [(a.name, str(a.type)) for a in getattr(replaced, overload)._schema.arguments]
        assert arguments == [(a.name, str(a.type)) for a in getattr(kept, overload)._schema.arguments]


def test_leaves_a_call_that_differs_in_more_than_its_name() -> None:
    check_pass(UnifyOpNames(), Computed(lambda x: torch.rsub(x, 1.0)), matches=0, there={"aten.rsub"})
