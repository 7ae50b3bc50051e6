"""RemoveNoOps removes calls that change nothing and no others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from check_pass import VOCAB, capture, check_pass
from torch import Tensor, nn
from torch.nn import functional as F

from llmc.ir.program import Program, op_name
from llmc.passes.match.remove_no_ops import RemoveNoOps

WIDTH, HEADS = 12, 3


class Around(nn.Module):
    """`change(x)` of hidden states [B, S, 12] between embedding and LM head."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)
        self.change = change

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.change(self.embed(tokens)))


def heads(x: Tensor) -> Tensor:
    return x.view(x.shape[0], x.shape[1], HEADS, WIDTH // HEADS).transpose(1, 2)


# The program ends in a view to the captured shape of the logits, which is one more no-op.
END = 1

GONE: dict[str, tuple[Callable[[Tensor], Tensor], int, set[str]]] = {
    "slice": (lambda x: x[:, 0:, :], 2, {"aten.slice"}),
    "slice to the length": (lambda x: x[:, : x.shape[1]], 1, {"aten.slice"}),
    "to": (lambda x: x.to(torch.float32), 1, {"aten.to"}),
    "float": (lambda x: x.float(), 1, {"aten.to"}),
    "type_as": (lambda x: x.type_as(x), 1, {"aten.type_as"}),
    "dropout in eval": (lambda x: F.dropout(x, 0.5, training=False), 1, {"aten.dropout"}),
    "dropout of nothing": (lambda x: F.dropout(x, 0.0, training=True), 1, {"aten.dropout"}),
    "contiguous": (
        lambda x: heads(x).contiguous().transpose(1, 2).flatten(2),
        4,
        {"aten.contiguous", "aten.transpose"},
    ),
    "clone": (lambda x: x.clone(), 1, {"aten.clone"}),
    "detach": (lambda x: x.detach(), 1, {"aten.detach"}),
    "expand": (lambda x: x.expand(-1, -1, WIDTH), 1, {"aten.expand"}),
    "view": (lambda x: x.view(x.shape), 1, {"aten.view"}),
    "squeeze": (lambda x: x.squeeze(2), 1, {"aten.squeeze"}),
    "flatten": (lambda x: x.flatten(2), 1, {"aten.flatten"}),
    "repeat": (lambda x: x.repeat(1, 1, 1), 1, {"aten.repeat"}),
    "repeat_interleave": (lambda x: x.repeat_interleave(1, dim=1), 1, {"aten.repeat_interleave"}),
    "roll": (lambda x: x.roll(0, 1), 1, {"aten.roll"}),
    "pad": (lambda x: F.pad(x, (0, 0, 0, 0)), 1, {"aten.pad"}),
    "mul": (lambda x: 1 * x * 1.0, 2, {"aten.mul"}),
    "div": (lambda x: x / 1, 1, {"aten.div"}),
    "add and sub": (lambda x: 0 + x - 0.0, 2, {"aten.add", "aten.sub"}),
    "pow": (lambda x: x**1, 1, {"aten.pow"}),
    "cat": (lambda x: torch.cat([x], -1), 1, {"aten.cat"}),
    "split": (lambda x: x.split(WIDTH, -1)[0], 1, {"aten.split", "getitem"}),
    "split with sizes": (lambda x: x.split([WIDTH], -1)[0], 1, {"aten.split_with_sizes", "getitem"}),
    "chunk": (lambda x: x.chunk(1, -1)[0], 1, {"aten.chunk", "getitem"}),
    "transposes": (lambda x: x.transpose(1, 2).transpose(-1, -2), 1, {"aten.transpose"}),
    "three permutes": (
        lambda x: heads(x).permute(0, 2, 3, 1).permute(0, 1, 3, 2).permute(0, 2, 1, 3).transpose(1, 2).flatten(2),
        4,
        {"aten.permute", "aten.view", "aten.flatten"},
    ),
    "permute to the same order": (lambda x: x.permute(0, 1, 2), 1, {"aten.permute"}),
    "unsqueeze and squeeze": (lambda x: x.unsqueeze(1).squeeze(1), 1, {"aten.unsqueeze", "aten.squeeze"}),
    "views that lead back": (lambda x: x.view(-1, 4).view(x.shape), 2, {"aten.view", "aten.reshape"}),
    "casts there and back": (lambda x: x.double().to(torch.float32), 1, {"aten.to"}),
}


@pytest.mark.parametrize("name", GONE)
def test_removes(name: str) -> None:
    change, matches, gone = GONE[name]
    check_pass(RemoveNoOps(), Around(change), matches=matches + END, gone={*gone, "aten.view"}, atol=0)


CHANGES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "a partial slice": (lambda x: F.pad(x[:, :, 1:], (0, 1)), "aten.slice"),
    "every second": (lambda x: x[:, :, ::2].repeat(1, 1, 2), "aten.slice"),
    "another dtype": (lambda x: x.to(torch.int64).to(torch.float32), "aten.to"),
    "a lossy cast": (lambda x: x.to(torch.bfloat16).to(torch.float32), "aten.to"),
    "large ints in float": (lambda x: (x * 1e9).to(torch.int64).to(torch.float32).to(torch.int64) * 1e-9, "aten.to"),
    "pad that shifts": (lambda x: F.pad(x, (1, -1)), "aten.pad"),
    "roll": (lambda x: x.roll(1, 2), "aten.roll"),
    "repeat": (lambda x: x[:, :, :6].repeat(1, 1, 2), "aten.repeat"),
    "uneven repeats": (
        lambda x: x.repeat_interleave(torch.tensor([0, 2, *[1] * 10]), dim=2, output_size=WIDTH),
        "aten.repeat_interleave",
    ),
    "mul by two": (lambda x: x * 2, "aten.mul"),
    "one minus": (lambda x: 1 - x, "aten.rsub"),
    "zero minus": (lambda x: torch.rsub(x, 0), "aten.rsub"),
    "floor": (lambda x: torch.div(x, 1, rounding_mode="floor"), "aten.div"),
    "int made float": (lambda x: (x * 9).long() / 1, "aten.div"),
    "a swap of equal sizes": (
        lambda x: F.pad(x[..., :9].unflatten(-1, (3, 3)).transpose(2, 3).flatten(2), (0, 3)),
        "aten.transpose",
    ),
    "transposes of other dims": (lambda x: heads(x).transpose(1, 2).transpose(2, 3).flatten(2), "aten.transpose"),
    "cat of two": (lambda x: torch.cat([x[..., :5], x[..., 5:]], -1), "aten.cat"),
    "the second part": (lambda x: x.split(6, -1)[1].repeat(1, 1, 2), "aten.split"),
    "bits": (lambda x: x.view(torch.int32).to(torch.float32) * 1e-9, "aten.view"),
    "dropout": (lambda x: x * (F.dropout(torch.ones_like(x), 0.5, training=True) >= 0), "aten.dropout"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_leaves(name: str) -> None:
    change, stays = CHANGES[name]
    original = capture(Around(change))
    program = original.copy()
    RemoveNoOps()(program)
    assert program.ops()[stays] >= 1
    check_pass(RemoveNoOps(), original, matches=RemoveNoOps()(original.copy()).matches, atol=0)


def test_a_view_after_a_copy_becomes_a_reshape_without_one() -> None:
    """Without the copy, `view` would refuse the transposed strides of the heads."""

    def change(x: Tensor) -> Tensor:
        swapped = (heads(x) * 2).transpose(1, 2).contiguous()
        s = swapped.view(x.shape[0], -1).view(x.shape)
        return F.dropout(s[:, 0:], 0.1, False).double().float()

    program = check_pass(RemoveNoOps(), Around(change), matches=7 + END, atol=0)
    assert program.ops() == {
        "aten.sym_size": 2,
        "aten.embedding": 1,
        "aten.reshape": 2,
        "aten.transpose": 2,
        "aten.mul": 1,
        "aten.linear": 1,
    }


def test_lossless_casts_before_another_cast_are_skipped() -> None:
    def change(x: Tensor) -> Tensor:
        return x.to(torch.bfloat16).to(torch.float32).to(torch.float64).to(torch.float16).to(torch.float32)

    program = check_pass(RemoveNoOps(), Around(change), matches=2 + END, atol=0)
    assert casts(program) == [torch.bfloat16, torch.float16, torch.float32]


def casts(program: Program) -> list[torch.dtype]:
    return [
        node.meta["val"].dtype for node in program.nodes if node.op == "call_function" and op_name(node) == "aten.to"
    ]


@pytest.mark.parametrize(
    ("wide", "narrow"),
    [
        (torch.bfloat16, torch.float16),
        (torch.float16, torch.bfloat16),
        (torch.float16, torch.int16),
        (torch.float32, torch.int32),
        (torch.int8, torch.uint8),
        (torch.int64, torch.float32),
        (torch.bool, torch.int8),
    ],
)
def test_a_cast_to_a_dtype_that_cannot_hold_all_values_stays(wide: torch.dtype, narrow: torch.dtype) -> None:
    program = capture(Around(lambda x: (x * 500).to(narrow).to(wide).to(narrow).to(torch.float32) / 500))
    RemoveNoOps()(program)
    assert wide in casts(program)


def test_leaves_a_copy_on_whose_strides_a_later_op_depends() -> None:
    def change(x: Tensor) -> Tensor:
        pairs = x.view(x.shape[0], x.shape[1], 2, -1).transpose(2, 3).contiguous()
        return torch.view_as_real(torch.view_as_complex(pairs * 2) * 1j).flatten(2)

    program = check_pass(
        RemoveNoOps(), Around(change), matches=1 + END, miss="changes strides", there={"aten.contiguous"}, atol=0
    )
    assert program.ops()["aten.reshape"] == 1


@pytest.mark.parametrize("sizes", [(6, 2), (2, 3, 2)])
def test_leaves_reshapes_on_whose_strides_a_later_op_depends(sizes: tuple[int, ...]) -> None:
    """Without the first of two reshapes, a pair would not be adjacent in memory."""

    def change(x: Tensor) -> Tensor:
        copied = x.unflatten(2, (2, -1)).transpose(2, 3).reshape(x.shape)
        pairs = copied.view(*x.shape[:2], *sizes)
        return torch.view_as_real(torch.view_as_complex(pairs) * 1j).flatten(2)

    check_pass(RemoveNoOps(), Around(change), matches=END, miss="changes strides", atol=0)
