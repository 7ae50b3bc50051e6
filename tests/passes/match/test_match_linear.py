"""Products with a weight become one op, whatever the weight's layout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from check_pass import VOCAB, check_pass
from torch import Tensor, nn
from torch.nn import functional as F

from llmc.passes.match.fold_constants import FoldConstants
from llmc.passes.match.match_linear import MatchLinear
from llmc.passes.match.remove_no_ops import RemoveNoOps

I, O = 12, 20  # noqa: E741
FIRST = [RemoveNoOps(), FoldConstants()]


class Layer(nn.Module):
    """`call(model, x)` of hidden states [B, S, 12], with weights [O, I] and [I, O]."""

    def __init__(self, call: Callable[[Layer, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, I)
        self.table = nn.Parameter(torch.randn(VOCAB, I))
        self.by_output = nn.Parameter(torch.randn(O, I))
        self.by_input = nn.Parameter(torch.randn(I, O))
        self.square = nn.Parameter(torch.randn(I, I))
        self.bias = nn.Parameter(torch.randn(O))
        self.experts = nn.Parameter(torch.randn(3, I, O))
        self.call = call

    def forward(self, tokens: Tensor) -> Tensor:
        return self.call(self, F.embedding(tokens, self.table))


def conv1d(m: Layer, x: Tensor) -> Tensor:
    """GPT-2's linear layer."""
    y = torch.addmm(m.bias, x.view(-1, x.size(-1)), m.by_input)
    return y.view(*x.shape[:-1], O)


ONE: dict[str, Callable[[Layer, Tensor], Tensor]] = {
    "linear": lambda m, x: F.linear(x, m.by_output, m.bias),
    "linear without bias": lambda m, x: F.linear(x, m.by_output),
    "conv1d": conv1d,
    "matmul": lambda m, x: x @ m.by_input,
    "matmul with a transpose": lambda m, x: torch.matmul(x, m.by_output.transpose(-1, -2)),
    "matmul with T": lambda m, x: x @ m.by_output.T,
    "matmul with a permute": lambda m, x: x @ m.by_output.permute(1, 0).contiguous(),
    "flat mm": lambda m, x: torch.mm(x.reshape(-1, I), m.by_input).reshape(x.shape[0], x.shape[1], 4, 5).flatten(2),
    "one vector": lambda m, x: (x[0, 0] @ m.by_input).expand(x.shape[0], x.shape[1], O),
}


@pytest.mark.parametrize("name", ONE)
def test_makes_one_linear(name: str) -> None:
    program = check_pass(
        MatchLinear(),
        Layer(ONE[name]),
        first=FIRST,
        matches=1,
        gone={"aten.linear", "aten.addmm", "aten.mm", "aten.matmul"},
        there={"llmc.linear"},
    )
    if name == "conv1d":
        assert not program.ops()["aten.reshape"]


WITH_BIAS: dict[str, Callable[[Layer, Tensor], Tensor]] = {
    "after": lambda m, x: x @ m.by_input + m.bias,
    "before": lambda m, x: m.bias + F.linear(x, m.by_output),
    "flattened tokens": lambda m, x: (x.view(-1, I) @ m.by_input + m.bias).view(x.shape[0], x.shape[1], O),
}


@pytest.mark.parametrize("name", WITH_BIAS)
def test_adds_the_bias_to_the_op(name: str) -> None:
    program = check_pass(
        MatchLinear(), Layer(WITH_BIAS[name]), first=FIRST, matches=2, gone={"aten.add", "aten.matmul", "aten.reshape"}
    )
    assert program.ops()["llmc.linear"] == 1


def test_an_lm_head_with_the_transposed_embedding_shares_its_weight() -> None:
    program = check_pass(MatchLinear(), Layer(lambda m, x: x @ m.table.t()), first=FIRST, matches=1)
    assert set(program.weights) == {"table"}


def test_a_weight_with_input_channels_first_is_transposed_under_its_own_name() -> None:
    program = check_pass(MatchLinear(), Layer(lambda m, x: x @ m.square @ m.square), first=FIRST, matches=2)
    assert set(program.weights) == {"table", "square_t"}
    assert program.weights["square_t"].evaluate().is_contiguous()


def test_tokens_stay_flat_if_a_user_reads_them_flat() -> None:
    def router(m: Layer, x: Tensor) -> Tensor:
        scores = F.linear(x.view(-1, I), m.by_output)
        return scores.softmax(-1).view(x.shape[0], x.shape[1], O) + scores.view(x.shape[0], x.shape[1], O)

    program = check_pass(MatchLinear(), Layer(router), first=FIRST, matches=1)
    assert program.ops()["aten.reshape"] == 3


def test_tokens_stay_flat_if_they_are_split_differently() -> None:
    def swapped(m: Layer, x: Tensor) -> Tensor:
        y = F.linear(x.reshape(-1, I), m.by_output)
        return y.reshape(x.shape[1], x.shape[0], O).transpose(0, 1)

    program = check_pass(MatchLinear(), Layer(swapped), first=FIRST, matches=1)
    assert program.ops()["aten.reshape"] == 2


def test_a_reshape_that_changes_the_width_stays() -> None:
    def halves(m: Layer, x: Tensor) -> Tensor:
        y = torch.mm(torch.cat([x, x], -1).reshape(-1, I), m.by_input)
        return y.reshape(x.shape[0], x.shape[1], 2 * O)

    program = check_pass(MatchLinear(), Layer(halves), first=FIRST, matches=1)
    assert program.ops()["aten.reshape"] == 2


LEFT: dict[str, tuple[Callable[[Layer, Tensor], Tensor], int, str, str]] = {
    "two values": (lambda m, x: x @ x.transpose(1, 2) @ x, 0, "", "aten.matmul"),
    "a computed weight": (lambda m, x: F.linear(x, m.by_output * x.mean()), 0, "the weight is computed", "aten.linear"),
    "experts": (lambda m, x: torch.matmul(x[:, None], m.experts).sum(1), 0, "3 dims", "aten.matmul"),
    "a weight on the left": (
        lambda m, x: (m.square @ x.transpose(1, 2)).transpose(1, 2),
        0,
        "left operand",
        "aten.matmul",
    ),
    "a scaled addmm": (
        lambda m, x: torch.addmm(m.bias, x.view(-1, I), m.by_input, beta=0.5).view(x.shape[0], x.shape[1], O),
        0,
        "scales",
        "aten.addmm",
    ),
    "addmm of a matrix": (
        lambda m, x: torch.addmm(x.view(-1, I), x.view(-1, I), m.square).view(x.shape),
        0,
        "no vector",
        "aten.addmm",
    ),
    "addmm of one number": (
        lambda m, x: torch.addmm(m.bias[:1], x.view(-1, I), m.square).view(x.shape),
        0,
        "no vector",
        "aten.addmm",
    ),
    "a bias of one": (lambda m, x: x @ m.by_input + m.bias[:1], 1, "no vector", "aten.add"),
    "a product with two users": (lambda m, x: ((y := x @ m.by_input) + m.bias) * y, 1, "other users", "aten.add"),
    "a scaled bias": (lambda m, x: torch.add(x @ m.by_input, m.bias, alpha=2), 1, "", "aten.add"),
    "a second bias": (lambda m, x: F.linear(x, m.by_output, m.bias) + m.bias, 1, "", "aten.add"),
    "a residual": (lambda m, x: x + x @ m.square, 1, "", "aten.add"),
}


@pytest.mark.parametrize("name", LEFT)
def test_leaves(name: str) -> None:
    call, matches, miss, stays = LEFT[name]
    check_pass(MatchLinear(), Layer(call), first=FIRST, matches=matches, miss=miss or None, there={stays})
