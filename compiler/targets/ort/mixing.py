"""A graph that can run the next tokens of several sequences together with a piece of one more sequence.

Everything but attention treats each token on its own, so the tokens of all sequences can be one row [1, N]: first one
token of each of D sequences, then the piece. Only attention, which takes one length for all sequences of a call, takes
them apart:

    attention(x)  becomes  If no piece:  attention(x)
                           else:         concat(attention(x[:D] as D sequences), attention(x[D:] as one sequence))

The piece has inputs and outputs of its own for the caches of its sequence. Its other input has the number of positions
that this sequence holds after the call, [1]; [0] elements mean that there is no piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ....ir.program import Program, op_name
from ....runtimes.engines.onnx_names import PIECE, past_name, piece_name, present_name
from ..onnx.external import ExternalData
from ..onnx.graph import Value
from ..onnx.lower import Lowering, Table, stored_as
from .contrib import CONTRIB, attention_lengths, many_queries
from .group_query_attention import GroupQueryAttention, Lengths, ManyQueries

# Ends a slice behind any token.
_END = 1 << 30


def can_mix(program: Program) -> bool:
    """Return True if only fused attention depends on positions and caches, each with caches of its own."""
    attentions = [node for node in program.nodes if op_name(node) == "llmc.fused_attention"]
    places = {part.name for cache in program.caches for part in cache.tensors}
    stateful = [node for node in program.nodes if node.op == "placeholder" and node.target in places]
    users = {user for node in (program.starts, *stateful) for user in node.users}
    return users == set(attentions) and all(len(node.users) == 1 for node in stateful)


class MixingLowering(Lowering):
    """Lowers a program to such a graph; see `can_mix`.

    Attributes:
        piece: the number of positions that the piece's sequence holds, [1], or [0] if there is no piece.
    """

    piece: Value

    def __init__(self, program: Program, data: ExternalData, derives: bool = False) -> None:
        super().__init__(program, MIXING, data, derives)
        self._piece_updates: dict[str, str] = {}

    def piece_cache(self, cache: Value) -> Value:
        """Return the input with the piece's part of a cache."""
        return Value(piece_name(cache), cache.dtype, cache.shape)

    def update_piece(self, cache: Value, updated: str) -> None:
        """Set the updated value of the piece's part of a cache."""
        self._piece_updates[cache] = updated

    def _make_inputs(self) -> None:
        super()._make_inputs()
        self.piece = self.input(PIECE, torch.int64, ["pieces"])
        for past, _, dtype, shape in self._piece_parts():
            self.input(piece_name(past), dtype, shape)

    def _make_outputs(self) -> None:
        super()._make_outputs()
        for past, present, dtype, shape in self._piece_parts():
            self.output(self._piece_updates[past], piece_name(present), dtype, shape)

    def _piece_parts(self) -> Iterator[tuple[str, str, torch.dtype, list[int | str]]]:
        for i, cache in enumerate(self.program.caches):
            for part in cache.tensors:
                shape: list[int | str] = [1, cache.heads, "piece_cache_length", part.width]
                yield past_name(i, part.role), present_name(i, part.role), stored_as(part.dtype), shape


def mixing_attention(
    g: MixingLowering, q: Value, k: Value | None, v: Value | None, k_cache: Value, v_cache: Value, starts: Value,
    **shared: Any,
) -> tuple[str, str, str]:  # fmt: skip
    """Write an attention for the rows of a batch, or for one row with tokens of several sequences and a piece.

    Args:
        shared: the remaining arguments of the op.
    """
    attention = GroupQueryAttention(g, int(k_cache.shape[1]), **shared)
    many, piece_many = (many_queries(g), _piece_many(g)) if attention.has_codes else (None, None)
    caches = k_cache, v_cache
    piece_caches = g.piece_cache(k_cache), g.piece_cache(v_cache)
    lengths, piece_lengths = attention_lengths(g), _piece_lengths(g)
    is_plain, count = _is_plain(g), _sequences(g)

    def plain() -> tuple[str, ...]:
        kept = (g.op("Identity", cache) for cache in piece_caches)  # the same memory: nothing is copied
        return *attention.write(g, (q, k, v), caches, lengths, many), *kept

    def mixed() -> tuple[str, ...]:
        first, last, axis = g.constant([0]), g.constant([_END]), g.constant([1])
        singles = [x and _swapped(g, g.op("Slice", x, first, count, axis)) for x in (q, k, v)]
        pieces = [x and g.op("Slice", x, count, last, axis) for x in (q, k, v)]
        out, *updated = attention.write(g, singles, caches, lengths)
        piece_out, *piece_updated = attention.write(g, pieces, piece_caches, piece_lengths, piece_many)
        return g.op("Concat", _swapped(g, out), piece_out, axis=1), *updated, *piece_updated

    results = [q.dtype, *(cache.dtype for cache in (*caches, *piece_caches))]
    out, keys, values, piece_keys, piece_values = g.if_else(is_plain, plain, mixed, results)
    g.update_piece(k_cache, piece_keys)
    g.update_piece(v_cache, piece_values)
    return out, keys, values


MIXING: Table = CONTRIB | {"llmc.fused_attention": mixing_attention}


def _swapped(g: MixingLowering, x: str) -> str:
    """Make a row of tokens a batch of sequences with one token each, or the reverse."""
    return g.op("Transpose", x, perm=[1, 0, 2])


def _is_plain(g: MixingLowering) -> Value:
    """Return True if there is no piece."""
    if "is plain" not in g.memo:
        g.memo["is plain"] = g.op("Squeeze", g.op("Equal", g.op("Shape", g.piece), g.constant([0])))
    return g.memo["is plain"]


def _sequences(g: MixingLowering) -> str:
    """Return the number of sequences beside the piece, [1]."""
    if "sequences" not in g.memo:
        g.memo["sequences"] = g.op("Shape", g.held)
    return g.memo["sequences"]


def _piece_lengths(g: MixingLowering) -> Lengths:
    """Return `attention_lengths` of the piece."""
    if "piece lengths" not in g.memo:
        last = g.cast(g.op("Sub", g.piece, g.constant([1])), torch.int32)
        # A sum, because it is defined for no piece too.
        longest = g.cast(g.op("ReduceSum", g.piece, g.constant([0]), keepdims=0), torch.int32)
        g.memo["piece lengths"] = last, longest
    return g.memo["piece lengths"]


def _piece_many(g: MixingLowering) -> ManyQueries:
    """Return `many_queries` of the piece."""
    if "piece many" not in g.memo:
        tokens = g.op("Shape", "input_ids", start=1, end=2)
        count = g.op("Max", g.op("Sub", tokens, _sequences(g)), g.constant([0]))
        starts = Value(g.op("Sub", g.piece, count), torch.int64, (1,))
        steps = g.op("Range", g.constant(0), g.op("Squeeze", count), g.constant(1))
        positions = g.op("Add", g.op("Unsqueeze", starts, g.constant([1])), steps)
        longest = Value(g.op("ReduceSum", g.piece, g.constant([0]), keepdims=1), torch.int64, (1,))
        g.memo["piece many"] = ManyQueries.of(g, starts, longest, Value(positions, torch.int64, (1, 1)))
    return g.memo["piece many"]
