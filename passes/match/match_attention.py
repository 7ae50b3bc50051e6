"""Replace spelled-out attention by one op, and its mask subgraph by a rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ...ir.nodes import set_value
from ...ir.program import Miss, Program
from ...ir.weights import Weight, constant
from ...kernels.ops import attention
from ..base import Fuel, Pass, PassResult, Rewrite, miss
from ..queries import arguments, dtype, is_call, same_shape, shape
from .attention_heads import Form, Heads, Scaling, heads_of, keys_of, repeated, scaled_by
from .attention_meaning import Meaning, find_meaning, sizes_to_look_at
from .attention_scores import Scores, Way, find_way, less_its_peak
from .token_independent import TokenIndependentValues, Unknown, is_off

aten = torch.ops.aten


class MatchAttention(Pass):
    """Replace spelled-out attention, and torch's own, by the attention op.

    Example:  p = softmax(q @ k.transpose(-1, -2) * scale + mask, -1);  y = p @ v
    Becomes:  y = attention(q, k, v, scale, causal, window, chunk, softcap, sinks, slopes, bias)

    Example:  y = scaled_dot_product_attention(q, k, v, mask)
    Becomes:  the same

    The mask may be any computation on sizes, positions and constants. The pass evaluates it at several lengths to find
    the rule that it follows. It does the same with biases, to recognize alibi. Repeated heads of k and v are replaced
    by the original ones. A scale on q or k is moved into the op. Heads that were merged with the batch are split off.

    Left alone: 1. the softmax is not over the keys; 2. a mask or bias depends on the tokens; 3. a mask follows no rule
    of the op; 4. a scale is not one positive number; 5. there is a call between product and softmax, or between softmax
    and values, that the op cannot express; 6. heads are merged with the batch in an unknown order, or the numbers of
    heads do not fit each other; 7. keys and queries differ in length; 8. a product is an einsum.
    """

    def run(self, program: Program, fuel: Fuel) -> PassResult:
        return _Attentions(program).run(program, fuel)


class _Attentions(Rewrite):
    """Rewrites the attentions of one program.

    Holds what layers share: the token-independent nodes, the meaning of each mask, the alibi slopes.
    """

    def __init__(self, program: Program) -> None:
        self.independent = TokenIndependentValues(program)
        self.batch = shape(program.tokens)[0]
        self.meanings: dict[Any, Meaning] = {}
        self.slopes: dict[bytes, Weight] = {}

    def rewrite(self, program: Program, node: fx.Node) -> bool | Miss | None:
        try:
            if is_call(node, "scaled_dot_product_attention"):
                return self._torch_attention(program, node)
            if is_call(node, "matmul", "bmm"):
                return self._spelled_out(program, node)
            if is_call(node, "einsum") and any(_to_softmax(x)[0] for x in arguments(node)["tensors"]):
                return miss("attention by einsum is not supported", node)
        except Unknown as unknown:
            return miss(unknown.why, unknown.node)
        return None

    def _torch_attention(self, program: Program, node: fx.Node) -> bool | Miss:
        values = arguments(node)
        q, k, v = values["query"], values["key"], values["value"]
        scale = shape(q)[-1] ** -0.5 if values["scale"] is None else self.independent.number(values["scale"])
        if values["dropout_p"] or scale is None:
            return miss("dropout is on" if values["dropout_p"] else "the scale is not one number", node)
        mask = values["attn_mask"]
        if mask is not None and mask not in self.independent:
            return miss("the mask depends on the tokens", node)
        meaning = self._meaning(Way(node, mask=mask, is_causal=values["is_causal"]))
        scalings = self._scalings(q, k)
        heads = heads_of(q, self.batch, scalings), heads_of(k, self.batch, scalings), heads_of(v, self.batch)
        return self._replace(program, node, heads, scalings, meaning, scale)

    def _spelled_out(self, program: Program, node: fx.Node) -> bool | Miss | None:
        weights, values = node.args[:2]
        assert isinstance(weights, fx.Node) and isinstance(values, fx.Node)
        softmax, zeroed, is_cut = _to_softmax(weights)
        if softmax is None:
            return None
        scores = softmax.args[0]
        assert isinstance(scores, fx.Node)
        if arguments(softmax)["dim"] not in (-1, len(shape(scores)) - 1):
            return miss("the softmax is not over the keys", softmax)
        sinks = None
        if is_cut:
            scores, sinks = _without_sinks(scores)
        way = find_way(scores, self.independent)
        if way is None:
            return miss("the softmax does not read a product of queries and keys", softmax)
        meaning = self._meaning(way)
        for fill in zeroed:
            self._check_zeroed(fill, way, meaning)
        q, k = way.product.args[1:3] if is_call(way.product, "baddbmm") else way.product.args[:2]
        assert isinstance(q, fx.Node) and isinstance(k, fx.Node)
        scalings = self._scalings(q, k)
        heads = heads_of(q, self.batch, scalings), keys_of(k, self.batch, scalings), heads_of(values, self.batch)
        return self._replace(program, node, heads, scalings, meaning, meaning.scale, sinks)

    def _scalings(self, q: fx.Node, k: fx.Node) -> list[Scaling]:
        return [scaling for x in (q, k) for scaling in scaled_by(x, self.independent.number)]

    def _meaning(self, way: Way) -> Meaning:
        if way.key not in self.meanings:
            self.meanings[way.key] = find_meaning(way, self.independent)
        return self.meanings[way.key]

    def _check_zeroed(self, fill: fx.Node, way: Way, meaning: Meaning) -> None:
        """Raise `Unknown` unless the weights that `fill` sets to zero are zero already."""
        mask = arguments(fill)["mask"]
        if mask not in self.independent or self.independent.number(arguments(fill)["value"]) != 0:
            raise Unknown("weights are overwritten after the softmax", fill)
        for size in sizes_to_look_at([mask], self.independent):
            at = self.independent.at(*size)
            positions = torch.arange(size[1])
            if bool((Scores(at, way).lift(mask, fill).bool() & meaning.rule.sees(positions, positions)).any()):
                raise Unknown("weights of visible keys are set to zero", fill)

    def _replace(
        self,
        program: Program,
        node: fx.Node,
        heads: tuple[Heads, Heads, Heads],
        scalings: Sequence[Scaling],
        meaning: Meaning,
        scale: float,
        sinks: fx.Node | None = None,
    ) -> bool:
        """Replace `node` by the op. All checks come before the first change to the graph."""
        q, k, v = _fitting(node, *heads)
        for scaling in scalings:
            scale *= scaling.factor
            program.replace(scaling.node, scaling.source)
        with program.graph.inserting_before(node):
            parts = [h.part(program, node) for h in (q, k, v)]
            widest = torch.float32 if len({dtype(p) for p in parts}) > 1 else dtype(parts[0])
            parts = [p if dtype(p) == widest else program.call(aten.to.dtype, p, widest, like=node) for p in parts]
            extra = {
                "causal": meaning.rule.causal,
                "window": meaning.rule.window,
                "chunk": meaning.rule.chunk,
                "softcap": meaning.softcap,
                "sinks": sinks,
                "slopes": self._slopes(program, meaning, q.count, node),
                "bias": _bias(program, meaning, node),
            }
            defaults = attention.signature.parameters
            kwargs = {name: value for name, value in extra.items() if value is not defaults[name].default}
            new = program.call(attention, *parts, scale, like=node, **kwargs)
            if dtype(new) != dtype(node):
                new = program.call(aten.to.dtype, new, dtype(node), like=node)
            if q.form is Form.SINGLE:
                new = program.call(aten.squeeze.dim, new, 1, like=node)
            elif len(shape(node)) == 3:
                new = program.call(aten.flatten.using_ints, new, 0, 1, like=node)
        program.replace(node, new)
        _loosen(program, new)
        return True

    def _slopes(self, program: Program, meaning: Meaning, count: int, like: fx.Node) -> fx.Node | None:
        if meaning.slopes is None:
            return None
        slopes = meaning.slopes.expand(count).contiguous()
        weight = self.slopes.setdefault(slopes.numpy().tobytes(), constant(slopes, "alibi_slopes"))
        return program.add_weight("alibi_slopes", weight, like=like)


def _to_softmax(weights: fx.Node) -> tuple[fx.Node | None, list[fx.Node], bool]:
    """Find the softmax from which attention weights are computed.

    Returns:
        The softmax call, or None; the calls after it that set weights to zero; True if the last column is cut off.
    """
    zeroed, is_cut, node = [], False, weights
    while not is_call(node, "softmax", "_softmax"):
        inner = node.args[0] if node.args else None
        if not isinstance(inner, fx.Node):
            return None, [], False
        if is_call(node, "masked_fill"):
            zeroed.append(node)
        elif is_call(node, "slice") and not same_shape(node, inner):
            cut = arguments(node)
            is_cut = cut["dim"] in (-1, len(shape(node)) - 1) and cut["start"] in (0, None) and cut["end"] == -1
            if not is_cut or cut["step"] != 1:
                return None, [], False
        elif not is_call(node, "to", "_to_copy", "type_as", "float", "contiguous", "clone", "slice") and not (
            (is_call(node, "dropout") and is_off(node))
            or (is_call(node, "view", "reshape", "_unsafe_view", "expand") and _keeps_last_two(node, inner))
        ):
            return None, [], False
        node = inner
    return node, zeroed, is_cut


def _keeps_last_two(a: fx.Node, b: fx.Node) -> bool:
    return [str(s) for s in shape(a)[-2:]] == [str(s) for s in shape(b)[-2:]]


def _without_sinks(scores: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Split scores with a column of sinks into the scores and the sinks [H].

    Matches `cat([scores, sinks.view(1, H, 1, 1).expand(B, H, S, 1)], -1)`.
    """
    if less_its_peak(scores):
        scores = scores.args[0]  # type: ignore[assignment]
    parts = scores.args[0] if is_call(scores, "cat") else ()
    if isinstance(parts, (list, tuple)) and len(parts) == 2 and arguments(scores)["dim"] in (-1, 3):
        own, sinks = parts
        while is_call(sinks, "expand", "view", "reshape", "unsqueeze", "to") and len(shape(sinks)) > 1:
            inner = sinks.args[0]
            heads = [s for s in shape(inner) if s != 1]  # type: ignore[arg-type]
            if is_call(sinks, "expand") and (len(shape(inner)) != 4 or shape(inner)[1:2] != tuple(heads)):  # type: ignore[arg-type]
                break
            sinks = inner
        if isinstance(own, fx.Node) and isinstance(sinks, fx.Node) and shape(sinks) == (shape(own)[1],):
            return own, sinks
    raise Unknown("the softmax has an extra column that is not one sink per head", scores)


def _fitting(node: fx.Node, q: Heads, k: Heads, v: Heads) -> tuple[Heads, Heads, Heads]:
    """Check that heads fit each other, and undo the repetition of those of k and v.

    The repetition is undone if it is the same for k and v. Raises `Unknown` for `node` if heads or lengths do not fit.
    """
    once = repeated(k), repeated(v)
    if once[0].count == once[1].count:
        k, v = once
    if k.count != v.count:
        raise Unknown("keys and values have different numbers of heads", node)
    if q.count % k.count or len({(h.form is Form.SINGLE) for h in (q, k, v)}) > 1:
        raise Unknown("the number of query heads is no multiple of the number of key heads", node)
    if not q.length == k.length == v.length:
        raise Unknown("keys and queries differ in length", node)
    return q, k, v


def _loosen(program: Program, node: fx.Node) -> None:
    """Let the views after `node` accept any memory layout.

    They may have relied on the layout that torch's attention gives its result.
    """
    for user in list(node.users):
        if is_call(user, "view"):
            user.target = aten.reshape.default
        elif is_call(user, "transpose", "permute"):
            set_value(user, program.infer(user.target, user.args, dict(user.kwargs)))  # type: ignore[arg-type]
            _loosen(program, user)


def _bias(program: Program, meaning: Meaning, like: fx.Node) -> fx.Node | None:
    """The sum of the biases, at the graph's insertion point; None without biases."""
    total = None
    for term, factor in meaning.bias:
        if factor != 1:
            term = program.call(aten.mul.Tensor, term, factor, like=like)
        total = term if total is None else program.call(aten.add.Tensor, total, term, like=like)
    return total
