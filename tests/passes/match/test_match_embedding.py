"""MatchEmbedding replaces lookups, but no masks, columns or negative indices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from check_pass import VOCAB, capture, check_pass
from torch import Tensor, nn
from torch.nn import functional as F

from llmc import LlmcError
from llmc.ir.weights import constant
from llmc.passes.base import miss
from llmc.passes.match.fold_constants import FoldConstants
from llmc.passes.match.match_embedding import MatchEmbedding
from llmc.passes.match.remove_no_ops import RemoveNoOps

WIDTH, PLACES = 12, 40
FIRST = [RemoveNoOps(), FoldConstants()]


class Tables(nn.Module):
    """Token embeddings [B, S, 12] plus `read(model, tokens, positions)`."""

    def __init__(self, read: Callable[[Tables, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, WIDTH, padding_idx=3)
        self.places = nn.Parameter(torch.randn(PLACES, WIDTH))
        self.deep = nn.Parameter(torch.randn(PLACES, 2, WIDTH))
        self.register_buffer("order", torch.randperm(PLACES))
        self.register_buffer("backwards", -torch.randperm(PLACES) - 1)
        self.read = read

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.embed(tokens) + self.read(self, tokens, positions)


def xglm(m: Tables, tokens: Tensor, positions: Tensor) -> Tensor:
    batch, length = positions.shape
    return m.places.index_select(0, positions.view(-1)).view(batch, length, WIDTH).detach()


def gather_with_expanded_indices(m: Tables, tokens: Tensor, positions: Tensor) -> Tensor:
    return torch.gather(m.places, 0, positions[0].unsqueeze(-1).expand(-1, WIDTH))


FOUND: dict[str, Callable[[Tables, Tensor, Tensor], Tensor]] = {
    "embedding": lambda m, t, p: F.embedding(p + 2, m.places),
    "embedding of int32": lambda m, t, p: F.embedding(p.int(), m.places),
    "index": lambda m, t, p: m.places[p],
    "index with an offset": lambda m, t, p: m.places[(p + 2).unsqueeze(-1)].squeeze(2),
    "index by a range": lambda m, t, p: m.places[torch.arange(t.shape[1])],
    "index by a clamped difference": lambda m, t, p: m.places[(p - 7).clamp(min=0)],
    "index by a constant": lambda m, t, p: F.embedding(p, m.places[m.order]),
    "index_select": lambda m, t, p: m.places.index_select(-2, p[0]),
    "xglm": xglm,
    "gather": gather_with_expanded_indices,
}


@pytest.mark.parametrize("name", FOUND)
def test_finds(name: str) -> None:
    program = check_pass(
        MatchEmbedding(),
        Tables(FOUND[name]),
        first=FIRST,
        matches=2,
        gone={"aten.embedding", "aten.index", "aten.index_select", "aten.gather"},
        atol=0,
    )
    if name == "xglm":
        assert not program.ops()["aten.reshape"]


def test_accepts_a_folded_weight_as_the_table() -> None:
    program = check_pass(MatchEmbedding(), Tables(lambda m, t, p: m.places[m.order][p]), first=FIRST, matches=2, atol=0)
    assert set(program.weights) == {"embed.weight", "places_index"}


def test_accepts_a_computed_table_in_an_embedding_call() -> None:
    check_pass(
        MatchEmbedding(), Tables(lambda m, t, p: F.embedding(p, m.places * t.shape[1])), first=FIRST, matches=2, atol=0
    )


LEFT: dict[str, tuple[Callable[[Tables, Tensor, Tensor], Tensor], str | None]] = {
    "a computed table": (lambda m, t, p: torch.index_select(m.places * t.shape[0], 0, p[0]), None),
    "two indices": (lambda m, t, p: m.places[p, p % WIDTH].unsqueeze(-1), "several indices"),
    "the second dim": (lambda m, t, p: m.places[:, p % WIDTH].sum(0).unsqueeze(-1), "several indices"),
    "columns": (lambda m, t, p: m.places.index_select(1, p[0] % WIDTH).sum(0)[:, None], "another dim"),
    "three dims": (lambda m, t, p: m.deep[p].sum(2), "3 dims"),
    "negative": (lambda m, t, p: m.places[p - 5], "negative"),
    "negative for some": (lambda m, t, p: m.places[torch.where(p > 3, m.backwards[0], p)], "negative"),
    "negative by a constant": (lambda m, t, p: m.places[m.backwards[:1] + p], "negative"),
    "negative by a constant on the right": (lambda m, t, p: m.places[p + m.backwards[:1]], "negative"),
    "negative although clamped": (lambda m, t, p: m.places[(p - 7).clamp(min=-3)], "negative"),
    "parts of table rows": (
        lambda m, t, p: m.places.gather(0, p[0, :, None].expand(-1, 4)).repeat(1, 3),
        "parts of table rows",
    ),
    "another index for each column": (
        lambda m, t, p: m.places.gather(0, p[0, :, None] + torch.arange(WIDTH)),
        "parts of table rows",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_leaves(name: str) -> None:
    read, miss = LEFT[name]
    check_pass(MatchEmbedding(), Tables(read), first=FIRST, matches=1, miss=miss, atol=0)


def test_leaves_a_mask() -> None:
    # Capture refuses a mask, because the size of the result depends on data. A pass may still create one.
    program = capture(Tables(lambda m, t, p: m.places[p]), first=[RemoveNoOps()])
    (node,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.index.Tensor)
    mask = program.add_weight("mask", constant(torch.arange(PLACES) > 4, "mask"), like=node)
    node.args = (node.args[0], [mask])
    assert MatchEmbedding().rewrite(program, node) == miss("its index is a mask", node)


def test_capture_refuses_a_mask() -> None:
    with pytest.raises(LlmcError, match="CAPTURE_DATA_DEPENDENT"):
        capture(Tables(lambda m, t, p: m.places[m.order > 4].sum(0)))
