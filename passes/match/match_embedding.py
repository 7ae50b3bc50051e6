"""Replace lookups in a table by the embedding op."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...ir.nodes import value_of
from ...ir.program import Miss, Program
from ...kernels.ops import embedding
from ..base import Rewrite, miss
from ..queries import arguments, dtype, is_call, number, shape
from .fold_constants import FoldConstants
from .match_linear import replace_unflattened
from .remove_no_ops import RemoveNoOps

_INTS = (torch.int64, torch.int32)


class MatchEmbedding(Rewrite):
    """Replace every lookup of whole table rows by the embedding op.

    Example:  e = embedding(table, tokens, padding_idx);  p = index(places, [positions])
    Becomes:  e = embedding(tokens, table);               p = embedding(positions, places)

    Example:  p = reshape(index_select(places, 0, reshape(positions, [-1])), [B, S, H])
    Becomes:  p = embedding(positions, places)

    A `gather` along dim 0 whose indices are expanded over the columns is the same lookup.

    Left alone: 1. a mask, or several indices; 2. a lookup along another dim than the first; 3. a table that is
    computed or is not two-dimensional; 4. an index that may be negative; 5. a gather of parts of table rows.
    """

    after = (RemoveNoOps, FoldConstants)

    def rewrite(self, program: Program, node: fx.Node) -> bool | Miss | None:
        if is_call(node, "embedding"):
            values = arguments(node)
            program.replace_with(node, embedding, values["indices"], values["weight"])
            return True
        if not is_call(node, "index", "index_select", "gather"):
            return None
        table: Any = node.args[0]
        if program.weight_of(table) is None:
            return None
        if len(shape(table)) != 2:
            return miss(f"the table has {len(shape(table))} dims", node)
        ids = _by_index(program, node) if is_call(node, "index") else _by_dim(node)
        if isinstance(ids, Miss):
            return ids
        replace_unflattened(program, node, embedding, ids, 0, table)
        return True


def _by_index(program: Program, node: fx.Node) -> fx.Node | Miss:
    """The indices of an `index` call along dim 0."""
    indices = arguments(node)["indices"]
    if len(indices) != 1:
        return miss("it has several indices or indexes another dim than the first", node)
    (ids,) = indices
    if dtype(ids) not in _INTS:
        return miss("its index is a mask", node)
    if not _never_negative(program, ids):
        return miss("its index may be negative", node)
    return ids


def _by_dim(node: fx.Node) -> fx.Node | Miss:
    """The indices of an `index_select` or `gather` call along dim 0."""
    values = arguments(node)
    ids = values["index"]
    if values["dim"] % 2 != 0:
        return miss("it looks up along another dim than the first", node)
    if is_call(node, "index_select"):
        return ids
    is_expanded = is_call(ids, "expand") and is_call(ids.args[0], "unsqueeze") and shape(ids.args[0])[1] == 1
    if not is_expanded or shape(ids)[1] != shape(values["self"])[1]:
        return miss("it gathers parts of table rows", node)
    return ids.args[0].args[0]


_MOVES = (
    "to", "reshape", "view", "unsqueeze", "squeeze", "flatten", "expand", "slice", "select", "transpose", "permute",
    "contiguous", "clone",
)  # fmt: skip
_FEW = 4096


def _never_negative(program: Program, value: Any) -> bool:
    """True if no element can be negative.

    Program inputs and sizes are never negative, and neither are their sums and products.
    """
    if not isinstance(value, fx.Node):
        constant = number(value)
        return constant is not None and constant >= 0
    if value.op == "placeholder" or isinstance(value_of(value), torch.SymInt):
        return True
    weight = program.weight_of(value)
    if weight is not None:
        return weight.numel <= _FEW and bool((weight.evaluate() >= 0).all())
    if is_call(value, *_MOVES):
        return _never_negative(program, value.args[0])
    if is_call(value, "add", "mul"):
        return arguments(value).get("alpha", 1) >= 0 and all(_never_negative(program, x) for x in value.args[:2])
    if is_call(value, "arange"):
        return all(_never_negative(program, x) for x in value.args)
    if is_call(value, "clamp", "clamp_min"):
        lower = arguments(value)["min"]
        return lower is not None and _never_negative(program, lower)
    return False
