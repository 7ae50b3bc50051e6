"""From attention over a whole sequence to attention over a cache and a few new tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from ...errors import LlmcError
from ...ir.program import Cache, Program, where
from ...ir.stages import Stage
from ...kernels.ops import attention, cached_attention, quant_cached_attention
from ...kernels.ops.quantized import CACHE_CODES
from ..base import Fuel, Pass, PassResult
from ..queries import is_op, shape

aten = torch.ops.aten


class InsertKvCache(Pass):
    """Give every attention a cache, and the program `starts` in place of `positions`.

    Example:  logits = f(tokens, positions), with out = attention(q, k, v, scale)
    Becomes:  logits, keys.0, values.0 = f(tokens, starts, keys.0, values.0),
              with positions = starts[:, None] + arange(S)
              and out, keys, values = cached_attention(q, k, v, keys.0, values.0, starts, scale)

    A layer that looks back `window` positions gets a ring of so many slots where that is less than `max_seq_len`.
    Attentions of the same keys and values share a cache.

    With codes, keys and values are rounded, and each cache brings its scales:
              out, keys, values, key_scales, value_scales = quant_cached_attention(
                  q, k, v, keys.0, values.0, key_scales.0, value_scales.0, starts, scale)

    Refused: 1. attention that is not causal; 2. a bias on the scores, which is made for a whole sequence; 3. keys
    that are not one for each token; 4. a program without attention. All or nothing, so fuel does not stop it.

    Args:
        ring: False gives every layer slots for all positions.
        codes: what keys and values are rounded to, "int8" or "fp8"; None keeps them as they are.
    """

    needs = Stage.OPTIMIZED
    reaches = Stage.CACHED

    def __init__(self, ring: bool = True, codes: str | None = None) -> None:
        self.ring = ring
        self.codes = None if codes is None else CACHE_CODES[codes]

    def run(self, program: Program, fuel: Fuel) -> PassResult:
        found = [node for node in program.nodes if is_op(node, attention)]
        if not found:
            raise _refused(program.output, "the program has no attention whose keys and values could be kept")
        calls = {node: attention.bind(node.args, dict(node.kwargs)) for node in found}
        for node, call in calls.items():
            _check(program, node, call)
        starts = _replace_positions(program)
        held: dict[Any, tuple[int, list[fx.Node]]] = {}
        results: list[fx.Node] = []
        caches: list[Cache] = []
        for node in found:
            call = calls[node]
            window = _reach(call)
            length = program.max_seq_len
            ring = self.ring and window is not None and window < length
            key = (call["k"], call["v"], ring and window)
            is_new = key not in held
            if is_new:
                size = min(length, window or length) if ring else length
                cache = _new_cache(call, len(caches), size, ring, window, self.codes)
                held[key] = len(caches), _inputs(program, cache)
                caches.append(cache)
            number, inputs = held[key]
            caches[number] = _seen_by(caches[number], window)
            rest = {n: call[n] for n in ("window", "chunk", "softcap", "sinks", "slopes") if call[n] is not None}
            with program.graph.inserting_before(node):
                new = program.call(
                    quant_cached_attention if self.codes else cached_attention,
                    call["q"], call["k"], call["v"], *inputs, starts, call["scale"], **rest,
                    **({"ring": True} if ring else {}), like=node,
                )  # fmt: skip
                parts = [program.item(new, i) for i in range(1 + len(inputs))]
            program.replace(node, parts[0])
            if is_new:
                results += parts[1:]
        (end,) = program.graph.find_nodes(op="output")
        end.args = ((*end.args[0][:1], *results),)
        program.caches = tuple(caches)
        return PassResult(len(found))


def _inputs(program: Program, cache: Cache) -> list[fx.Node]:
    batch = program.inputs[0].meta["val"].shape[0]
    made = []
    for part in cache.tensors:
        with program.fake_mode:
            value = torch.empty(batch, cache.heads, cache.length, part.width, dtype=part.dtype)
        made.append(program.add_input(part.name, value, after=program.inputs[-1]))
    return made


def _check(program: Program, node: fx.Node, call: dict[str, Any]) -> None:
    if not call["causal"]:
        raise _refused(node, "attention looks ahead, so what was computed for earlier tokens changes with later ones")
    if call["bias"] is not None:
        raise _refused(node, "attention adds a bias to its scores that is made for a whole sequence at once")
    tokens = [str(size) for size in shape(program.inputs[0])]
    if any([str(shape(call[name])[dim]) for dim in (0, 2)] != tokens for name in ("q", "k")):
        raise _refused(node, "attention does not have one query and one key for each token of each sequence")


def _refused(node: fx.Node, reason: str) -> LlmcError:
    return LlmcError(
        "CACHE_IMPOSSIBLE",
        f"In {where(node) or node.name}, {reason}.",
        "llmc compiles decoders that keep keys and values; `llmc inspect` shows what this model does.",
    )


def _reach(call: dict[str, Any]) -> int | None:
    """How many positions back, itself included, a query may look."""
    limits = [limit for limit in (call["window"], call["chunk"]) if limit is not None]
    return min(limits, default=None)


def _new_cache(
    call: dict[str, Any], number: int, length: int, ring: bool, window: int | None, codes: torch.dtype | None
) -> Cache:
    k, v = call["k"].meta["val"], call["v"].meta["val"]
    return Cache(
        keys=f"keys_{number}",
        values=f"values_{number}",
        heads=int(k.shape[1]),
        key_dim=int(k.shape[3]),
        value_dim=int(v.shape[3]),
        length=length,
        ring=ring,
        window=window,
        dtype=codes or k.dtype,
        key_scales=f"key_scales_{number}" if codes else None,
        value_scales=f"value_scales_{number}" if codes else None,
    )


def _seen_by(cache: Cache, window: int | None) -> Cache:
    """The cache with one more reader, which may look back farther."""
    limits = (cache.window, window)
    return replace(cache, window=None if None in limits else max(limits))  # type: ignore[type-var]


def _replace_positions(program: Program) -> fx.Node:
    """Make `starts` the second input, and positions what follows from it; returns `starts`."""
    tokens, positions = program.inputs
    batch = tokens.meta["val"].shape[0]
    with program.fake_mode:
        value: Tensor = torch.empty(batch, dtype=torch.int64)
    starts = program.add_input("starts", value, after=tokens)
    starts.meta["where"] = ""
    for node in list(positions.users):
        if node.target is aten.sym_size.int:
            with program.graph.inserting_before(node):
                program.replace(node, program.call(aten.sym_size.int, tokens, node.args[1], like=tokens))
    if positions.users:
        first = next(n for n in program.nodes if n.op not in ("placeholder", "get_attr"))
        with program.graph.inserting_before(first):
            length = program.call(aten.sym_size.int, tokens, 1, like=tokens)
            steps = program.call(aten.arange.default, length, dtype=torch.int64, like=tokens)
            column = program.call(aten.unsqueeze.default, starts, 1, like=tokens)
            counted = program.call(aten.add.Tensor, column, steps, like=tokens)
        positions.replace_all_uses_with(counted)
    program.graph.erase_node(positions)
    return starts
