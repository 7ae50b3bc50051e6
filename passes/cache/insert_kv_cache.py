"""Turn attention over a whole sequence into attention over a KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from ...errors import LlmcError
from ...ir.caches import Cache, ChannelScales
from ...ir.nodes import set_where, value_of
from ...ir.program import Program, where
from ...ir.stages import Stage
from ...ir.weights import constant
from ...kernels.ops import attention, cached_attention, quant_cached_attention
from ...kernels.ops.quantized import CACHE_CODES
from ..base import Fuel, Numerics, Pass, PassResult
from ..queries import is_op, shape

aten = torch.ops.aten


class InsertKvCache(Pass):
    """Give each attention a KV cache, and replace the input `positions` by `starts`.

    Example:  logits = f(tokens, positions), with out = attention(q, k, v, scale)
    Becomes:  logits, keys.0, values.0 = f(tokens, starts, keys.0, values.0),
              with positions = starts[:, None] + arange(S)
              and out, keys, values = cached_attention(q, k, v, keys.0, values.0, starts, scale)

    An attention whose window or chunk is shorter than `max_seq_len` gets a ring cache of that length, and of `slack`
    positions more: a sequence can go back by `slack` + 1 positions and find all keys that its window still sees. If
    that is not shorter than `max_seq_len`, the cache has a place for all positions. Attentions of the same keys and
    values share a cache.

    With `codes`, keys and values are quantized and each cache has scales too:
              out, keys, values, key_scales, value_scales = quant_cached_attention(
                  q, k, v, keys.0, values.0, key_scales.0, value_scales.0, starts, scale)
    With constant scales, the caches are as without codes, and the scales are weights:
              out, keys, values = cached_attention(
                  q, k, v, keys.0, values.0, starts, scale, k_scales=keys.0.scales, v_scales=values.0.scales)
    A ring cache has no constant scales.

    Refused: 1. attention that is not causal; 2. a bias on the scores, which is computed for the whole sequence; 3. a
    number of queries or keys that is not one for each token; 4. a program without attention. The pass rewrites all
    attentions or none, so it ignores fuel.

    Args:
        ring: if False, each cache has a place for all positions.
        codes: the dtype that keys and values are quantized to, "int8" or "fp8"; None keeps their dtype.
        slack: how many positions a ring cache has beyond the window.
        scales: the constant scales of int8 codes for each attention, in the program's order. If empty, all scales are
            those of single tokens.
    """

    needs = Stage.OPTIMIZED
    reaches = Stage.CACHED

    def __init__(
        self, ring: bool = True, codes: str | None = None, slack: int = 0, scales: Sequence[ChannelScales] = ()
    ) -> None:
        if scales and codes != "int8":
            raise ValueError(f"only int8 codes can have constant scales, not {codes}")
        self.ring = ring
        self.slack = slack
        self.scales = scales
        if codes is not None:
            self.numerics = Numerics.QUANTIZES_INPUTS
        self.codes = None if codes is None else CACHE_CODES[codes]

    def run(self, program: Program, fuel: Fuel) -> PassResult:
        attentions = [node for node in program.nodes if is_op(node, attention)]
        if not attentions:
            raise _refused(program.output, "the program has no attention, so it has no keys and values to cache")
        calls = {node: attention.bind(node.args, dict(node.kwargs)) for node in attentions}
        for node, call in calls.items():
            _check(program, node, call)
        starts = _replace_positions(program)
        known: dict[Any, tuple[int, list[fx.Node]]] = {}  # by keys, values and ring length
        results: list[fx.Node] = []
        caches: list[Cache] = []
        for i, node in enumerate(attentions):
            call = calls[node]
            window = _window(call)
            length = program.max_seq_len
            size = length if window is None else window + self.slack
            ring = self.ring and size < length
            scales = self.scales[i] if self.scales and not ring else None
            key = (call["k"], call["v"], ring and window)
            is_new = key not in known
            if is_new:
                size = size if ring else length
                cache = _new_cache(call, len(caches), size, ring, window, self.codes, scales is None)
                known[key] = len(caches), _add_inputs(program, cache)
                caches.append(cache)
            number, inputs = known[key]
            caches[number] = _with_window(caches[number], window)
            options = {n: call[n] for n in ("window", "chunk", "softcap", "sinks", "slopes") if call[n] is not None}
            if scales is not None:
                options |= _add_scales(program, caches[number], scales, node)
            with program.graph.inserting_before(node):
                new = program.call(
                    quant_cached_attention if self.codes and scales is None else cached_attention,
                    call["q"], call["k"], call["v"], *inputs, starts, call["scale"], **options,
                    **({"ring": True} if ring else {}), like=node,
                )  # fmt: skip
                parts = [program.item(new, i) for i in range(1 + len(inputs))]
            program.replace(node, parts[0])
            if is_new:
                results += parts[1:]
        (end,) = program.graph.find_nodes(op="output")
        end.args = ((*end.args[0][:1], *results),)
        program.caches = tuple(caches)
        return PassResult(len(attentions))


def _add_inputs(program: Program, cache: Cache) -> list[fx.Node]:
    batch = value_of(program.tokens).shape[0]
    inputs = []
    for part in cache.tensors:
        with program.fake_mode:
            value = torch.empty(batch, cache.heads, cache.length, part.width, dtype=part.dtype)
        inputs.append(program.add_input(part.name, value, after=program.inputs[-1]))
    return inputs


def _add_scales(program: Program, cache: Cache, scales: ChannelScales, like: fx.Node) -> dict[str, fx.Node]:
    """Return the options with which `cached_attention` quantizes by channel."""
    weights = {}
    for option, name, values in (("k_scales", cache.keys, scales.keys), ("v_scales", cache.values, scales.values)):
        name = f"{name}.scales"
        weights[option] = program.add_weight(name, constant(values, name), like=like)
    return weights


def _check(program: Program, node: fx.Node, call: dict[str, Any]) -> None:
    if not call["causal"]:
        raise _refused(node, "attention is not causal, so later tokens would change what was computed for earlier ones")
    if call["bias"] is not None:
        raise _refused(node, "attention adds a bias to its scores that is computed for the whole sequence")
    tokens = [str(size) for size in shape(program.tokens)]
    if any([str(shape(call[name])[dim]) for dim in (0, 2)] != tokens for name in ("q", "k")):
        raise _refused(node, "attention does not have one query and one key for each token of each sequence")


def _refused(node: fx.Node, reason: str) -> LlmcError:
    return LlmcError(
        "CACHE_IMPOSSIBLE",
        f"In {where(node) or node.name}, {reason}.",
        "llmc compiles decoders that cache keys and values. Run `llmc inspect MODEL` to see this model's ops.",
    )


def _window(call: dict[str, Any]) -> int | None:
    """Return the number of positions that a query sees, its own included; None: all."""
    limits = [limit for limit in (call["window"], call["chunk"]) if limit is not None]
    return min(limits, default=None)


def _new_cache(
    call: dict[str, Any],
    number: int,
    length: int,
    ring: bool,
    window: int | None,
    codes: torch.dtype | None,
    scales_by_token: bool,
) -> Cache:
    k, v = value_of(call["k"]), value_of(call["v"])
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
        key_scales=f"key_scales_{number}" if codes and scales_by_token else None,
        value_scales=f"value_scales_{number}" if codes and scales_by_token else None,
    )


def _with_window(cache: Cache, window: int | None) -> Cache:
    """Return the cache with a window of at least `window`; None has no limit."""
    limits = (cache.window, window)
    return replace(cache, window=None if None in limits else max(limits))  # type: ignore[type-var]


def _replace_positions(program: Program) -> fx.Node:
    """Add the input `starts`, compute positions from it, and return it."""
    tokens, positions = program.tokens, program.positions
    batch = value_of(tokens).shape[0]
    with program.fake_mode:
        value: Tensor = torch.empty(batch, dtype=torch.int64)
    starts = program.add_input("starts", value, after=tokens)
    set_where(starts, "")
    for node in list(positions.users):
        if node.target is aten.sym_size.int:
            with program.graph.inserting_before(node):
                program.replace(node, program.call(aten.sym_size.int, tokens, node.args[1], like=tokens))
    if positions.users:
        first = next(n for n in program.nodes if n.op not in ("placeholder", "get_attr"))
        with program.graph.inserting_before(first):
            length = program.call(aten.sym_size.int, tokens, 1, like=tokens)
            steps = program.call(aten.arange.default, length, dtype=torch.int64, like=tokens)
            starts_2d = program.call(aten.unsqueeze.default, starts, 1, like=tokens)
            computed = program.call(aten.add.Tensor, starts_2d, steps, like=tokens)
        positions.replace_all_uses_with(computed)
    program.graph.erase_node(positions)
    program.signature = replace(program.signature, positions=None, starts="starts")
    return starts
