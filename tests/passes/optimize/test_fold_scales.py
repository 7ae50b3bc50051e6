"""FoldScales folds numbers into weights and attention where this is safe."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from check_pass import VOCAB, capture, check_pass
from torch import Tensor, nn
from torch.nn import functional as F

from llmc.ir.program import Program
from llmc.ir.stages import Stage
from llmc.ir.weights import constant
from llmc.kernels.ops import attention, linear, quant_linear, rope
from llmc.passes.match.fold_constants import FoldConstants
from llmc.passes.match.match_embedding import MatchEmbedding
from llmc.passes.match.match_linear import MatchLinear
from llmc.passes.match.remove_no_ops import RemoveNoOps
from llmc.passes.optimize.fold_scales import FoldScales

WIDTH, HEADS = 12, 3
FIRST = [RemoveNoOps(), FoldConstants(), MatchLinear(), MatchEmbedding()]


class Scaled(nn.Module):
    """A model that computes `change(model, embeddings)`."""

    def __init__(self, change: Callable[[Scaled, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.norm = nn.Sigmoid()  # an example of a nonlinear op
        self.a = nn.Linear(WIDTH, WIDTH)
        self.b = nn.Linear(WIDTH, WIDTH, bias=False)
        self.c = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.register_buffer("number", torch.tensor(0.37))
        self.register_buffer("cos", torch.rand(32, WIDTH // HEADS // 2))
        self.register_buffer("sin", torch.rand(32, WIDTH // HEADS // 2))
        self.change = change

    def forward(self, tokens: Tensor) -> Tensor:
        return self.change(self, self.embed(tokens))

    def heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], HEADS, -1).transpose(1, 2)

    def rotated(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[2]).expand(x.shape[0], -1)
        return rope(x, positions, self.cos, self.sin)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        return attention(q, k, v, 0.5, **options).transpose(1, 2).reshape(q.shape[0], q.shape[2], -1)


def scales(program: Program) -> list[float]:
    return [attention.bind(n.args, n.kwargs)["scale"] for n in program.nodes if n.target is attention.overload]


FOLDS: dict[str, tuple[Callable[[Scaled, Tensor], Tensor], int, set[str]]] = {
    "logits divided": (lambda m, x: m.head(x.sin()) / 8.0, 1, {"head.weight_scaled"}),
    "bias too": (lambda m, x: 0.25 * m.a(x.sin()), 1, {"a.weight_scaled", "a.bias_scaled"}),
    "by a buffer": (lambda m, x: m.a(x.sin()) * m.number, 1, {"a.weight_scaled", "a.bias_scaled"}),
    "twice": (lambda m, x: m.head(x.sin()) * 3.0 / 7, 2, {"head.weight_scaled_2"}),
    "after heads": (
        lambda m, x: (m.heads(m.a(x.sin())) * 0.3).cos().mean(-1).transpose(1, 2),
        1,
        {"a.weight_scaled", "a.bias_scaled"},
    ),
    "before a linear": (lambda m, x: m.a((x.sin() / 3.0).contiguous()), 1, {"a.weight_scaled", "a.bias"}),
    "before two linears": (
        lambda m, x: m.a(y := x.sin() * 3.0) - m.b(y).cos(),
        1,
        {"a.weight_scaled", "b.weight_scaled"},
    ),
    "embedding": (lambda m, x: m.norm(x * WIDTH**0.5) + 1.5, 1, {"embed.weight_scaled"}),
    "embedding, by a buffer": (lambda m, x: m.norm(x * m.number.to(torch.float32)), 1, {"embed.weight_scaled"}),
}


@pytest.mark.parametrize("name", FOLDS)
def test_folds(name: str) -> None:
    change, matches, weights = FOLDS[name]
    program = check_pass(FoldScales(), Scaled(change), first=FIRST, matches=matches, gone={"aten.mul", "aten.div"})
    assert weights <= set(program.weights)


ATTENTION: dict[str, Callable[[Scaled, Tensor], Tensor]] = {
    "q": lambda m, x: m.attend(m.heads(x) * 0.3, m.heads(x.sin()), m.heads(x.cos())),
    "q before it is split into heads": lambda m, x: m.attend(m.heads(m.a(x) * 0.3), m.heads(x.sin()), m.heads(x.cos())),
    "k": lambda m, x: m.attend(m.heads(x), m.heads(x.sin()) / (1 / 0.3), m.heads(x.cos())),
    "through rope": lambda m, x: m.attend(m.rotated(m.heads(x) * 0.3), m.heads(x.sin()), m.heads(x.cos())),
    "under a cap": lambda m, x: m.attend(m.heads(x) * 0.3, m.heads(x.sin()), m.heads(x.cos()), softcap=1.5),
    "with a slope": lambda m, x: m.attend(
        m.heads(x) * 0.3, m.heads(x.sin()), m.heads(x.cos()), slopes=m.cos.flatten()[:HEADS]
    ),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_folds_into_attention(name: str) -> None:
    program = check_pass(FoldScales(), Scaled(ATTENTION[name]), first=FIRST, matches=1, gone={"aten.mul", "aten.div"})
    assert scales(program) == pytest.approx([0.5 * 0.3])
    assert not [weight for weight in program.weights if "scaled" in weight]


def test_q_and_k_both() -> None:
    def change(m: Scaled, x: Tensor) -> Tensor:
        return m.attend(m.heads(m.a(x) * 0.3), m.heads(m.b(x) * 0.7), m.heads(m.c(x) * 2.0))

    program = check_pass(FoldScales(), Scaled(change), first=FIRST, matches=3, gone={"aten.mul"})
    assert scales(program) == pytest.approx([0.5 * 0.3 * 0.7])
    assert "c.weight_scaled" in program.weights


def test_leaves_a_factor_of_v() -> None:
    program = check_pass(
        FoldScales(),
        Scaled(lambda m, x: m.attend(m.heads(x), m.heads(x.sin()), m.heads(x.cos()) * 0.3)),
        first=FIRST,
        matches=0,
        there={"aten.mul"},
    )
    assert scales(program) == [0.5]


LEFT: dict[str, tuple[Callable[[Scaled, Tensor], Tensor], str | None]] = {
    "a tied head": (lambda m, x: F.linear(m.norm(x), m.embed.weight) * 0.3, "embed.weight is used elsewhere"),
    "a tied embedding": (lambda m, x: F.linear(m.norm(x * 3.0), m.embed.weight), "embed.weight is used elsewhere"),
    "a layer called twice": (lambda m, x: m.a(m.a(x.sin()) * 0.3), "a.weight is used elsewhere"),
    "a shared bias": (lambda m, x: F.linear(x, m.b.weight, m.a.bias) * 0.3 + m.a.bias, "a.bias is used elsewhere"),
    "the unscaled value is used": (lambda m, x: (y := m.a(x.sin())) * 0.3 + y.cos(), "unscaled value has other users"),
    "its unscaled heads are used": (
        lambda m, x: (m.heads(y := m.a(x.sin())) * 0.3).flatten(2).mean() + y,
        "unscaled value",
    ),
    "the scaled input is used": (lambda m, x: m.norm(m.a(y := x.sin() * 0.3)) + y, "scaled value has other users"),
    "the scaled q is used": (
        lambda m, x: m.attend(q := m.heads(x.sin()) * 0.3, m.heads(x.sin()), m.heads(x.cos())) + q.mean(),
        "scaled value has other users",
    ),
    "a query that is its own key": (lambda m, x: m.attend(q := m.heads(x.sin()) * 0.3, q, m.heads(x.cos())), None),
    "an activation before": (lambda m, x: m.norm(m.a(x).relu() * 0.3), None),
    "an activation after": (lambda m, x: m.a((x.sin() * 0.3).tanh()), None),
    "a softcap": (lambda m, x: torch.tanh(m.norm(m.head(x)) / 30.0) * 30.0, None),
    "a sum before": (lambda m, x: m.norm((m.a(x) + x) * 0.3), None),
    "a vector": (lambda m, x: m.a(x.sin()) * m.c.bias, None),
    "a number divided by it": (lambda m, x: 0.3 / (m.a(x) + 100), None),
    "a buffer divided by it": (lambda m, x: m.number / m.a(x.sin()), None),
    "an input that is the bias too": (
        lambda m, x: F.linear(v := x[0, 0].sin() * 0.3, m.b.weight, v) + x,
        None,
    ),
    "rounded down": (lambda m, x: torch.div(m.a(x.sin()), 0.3, rounding_mode="floor"), None),
    "another dtype": (lambda m, x: m.norm((m.a(x.sin()) * m.number.double().view(1)).float()), None),
    "another shape": (lambda m, x: (m.a(x.sin()) * m.number.view(1, 1, 1, 1))[0], None),
    "a computed weight": (
        lambda m, x: m.norm(F.embedding(torch.arange(x.shape[1]) % WIDTH, m.b.weight * x.mean()) * 0.3) + x,
        "computed",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_leaves(name: str) -> None:
    change, miss = LEFT[name]
    program = check_pass(FoldScales(), Scaled(change), first=FIRST, matches=0, miss=miss)
    assert program.ops()["aten.mul"] + program.ops()["aten.div"]


def test_leaves_a_quantized_weight() -> None:
    program = capture(Scaled(lambda m, x: m.b(x.sin()) * 0.3), first=FIRST)
    (node,) = (n for n in program.nodes if n.target is linear.overload)
    torch.manual_seed(0)
    parts = {"codes": torch.randint(-127, 128, (WIDTH, WIDTH)).to(torch.int8), "scales": torch.rand(WIDTH, 1)}
    codes, scale = (program.add_weight(name, constant(value, name), like=node) for name, value in parts.items())
    program.replace_with(node, quant_linear, node.args[0], codes, scale, None, None, "int8", WIDTH)
    program.sweep()
    program.stage = Stage.QUANTIZED
    check_pass(FoldScales(), program, matches=0, there={"aten.mul", "llmc.quant_linear"})
