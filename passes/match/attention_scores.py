"""Follow attention scores from the product of queries and keys to the softmax.

Models apply scale, softcap, alibi and mask in many orders. Each step is therefore evaluated on real numbers. This is
possible because the other operands of the steps are token-independent, so they can be evaluated at any length.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ...ir.nodes import value_of
from ...ir.program import op_name
from ..queries import arguments, is_call, shape
from .token_independent import SizedValues, TokenIndependentValues, Unknown, is_off

# A key with a score this low has no weight: its exp vanishes next to that of any key that is seen.
_HIDDEN = -9000.0


@dataclass(frozen=True)
class ScoreStep:
    """One call between the product and the softmax.

    Attributes:
        node: the call.
        scores: the argument of `node` that holds the scores.
    """

    node: fx.Node
    scores: fx.Node

    @property
    def name(self) -> str:
        return op_name(self.node).removeprefix("aten.")

    @property
    def other(self) -> Any:
        """The other operand of a binary call."""
        a, b = self.node.args[:2]
        return b if a is self.scores else a


@dataclass(frozen=True)
class Way:
    """The calls from the product of queries and keys to the softmax.

    Attributes:
        product: the matmul of queries and keys, or a call of torch's attention, which includes the softmax.
        steps: the calls after the product, in order.
        mask, is_causal: arguments of torch's attention.
    """

    product: fx.Node
    steps: tuple[ScoreStep, ...] = ()
    mask: fx.Node | None = None
    is_causal: bool = False

    @property
    def sides(self) -> list[fx.Node]:
        """The inputs of the steps other than the scores: masks, biases and factors."""
        inputs = [n for step in self.steps for n in step.node.all_input_nodes if n is not step.scores]
        return [*inputs, *(n for n in (self.mask, self.base) if n is not None)]

    @property
    def base(self) -> fx.Node | None:
        """The tensor to which a baddbmm adds its product, if there is one."""
        product = self.product
        return product.args[0] if is_call(product, "baddbmm") and arguments(product)["beta"] else None  # type: ignore[return-value]

    @property
    def key(self) -> tuple[Any, ...]:
        """A key that is equal for ways with the same calls, as in the layers of a model."""
        own = {step.scores for step in self.steps}
        calls = [(s.node.target, [a for a in s.node.args if a not in own], s.node.kwargs) for s in self.steps]
        product = (self.base, self.product.args[3:], self.product.kwargs, self.mask, self.is_causal)
        return (*(str(call) for call in [*calls, product]), *map(str, shape(self.product)))


def find_way(scores: fx.Node, independent: TokenIndependentValues) -> Way | None:
    """The calls from the product of queries and keys to `scores`.

    Returns None if `scores`, the argument of a softmax, does not come from a product. Raises `Unknown` if a mask or
    bias between the two depends on the tokens.
    """
    steps: list[ScoreStep] = []
    node = scores
    while not is_call(node, "matmul", "bmm", "baddbmm"):
        dependent = [n for n in node.all_input_nodes if n not in independent]
        if less_its_peak(node) or is_call(node, "type_as", "expand_as"):
            dependent = dependent[:1]
        elif op_name(node).removeprefix("aten.") not in _FOLLOW:
            return None
        if len(dependent) > 1 and any(find_way(n, independent) for n in dependent):
            raise Unknown("the scores are masked or biased by something that depends on the tokens", node)
        if len(dependent) != 1:
            return None
        steps.append(ScoreStep(node, dependent[0]))
        node = dependent[0]
    if len(shape(node)) not in (3, 4):
        return None
    way = Way(node, tuple(reversed(steps)))
    if way.base is not None and way.base not in independent:
        raise Unknown("the scores are masked or biased by something that depends on the tokens", node)
    return way


def less_its_peak(node: fx.Node) -> bool:
    """True for `x - amax(x)` over the last dim, which does not change the softmax."""
    if not is_call(node, "sub"):
        return False
    x, peak = node.args[:2]
    if isinstance(peak, fx.Node) and getattr(peak.target, "__name__", "") == "getitem":
        peak = peak.args[0]
    if not is_call(peak, "amax", "max") or peak.args[0] is not x or not arguments(peak).get("keepdim"):
        return False
    last = len(shape(peak.args[0])) - 1  # type: ignore[arg-type]
    return arguments(peak)["dim"] in (-1, last, [-1], [last])


@dataclass
class Scores:
    """The scores at one batch size and length, as a function of the product.

    They are `offset + scale * product`, or `offset + scale * tanh(inner * product)` with a softcap. Tensors are
    [B or 1, H or 1, S or 1, S or 1].

    Attributes:
        lost: where a constant has overwritten the product.
        added: the terms of `offset` that were added, each with its factor; `scores` of such a step is the term.
    """

    at: SizedValues
    way: Way
    scale: float = 1.0
    inner: float | None = None
    offset: Tensor = field(default_factory=lambda: torch.zeros(1, 1, 1, 1))
    lost: Tensor = field(default_factory=lambda: torch.zeros(1, 1, 1, 1, dtype=torch.bool))
    added: list[tuple[ScoreStep, float]] = field(default_factory=list)

    def follow(self) -> Scores:
        """Apply all steps and return self.

        Raises `Unknown` at a step that the attention op cannot express.
        """
        product = self.way.product
        if is_call(product, "baddbmm"):
            values = arguments(product)
            self.scale = self.number(values["alpha"], product)
            if (base := self.way.base) is not None:
                self.add(ScoreStep(product, product), base, self.number(values["beta"], product))
        if self.way.is_causal:
            later = torch.ones(self.length, self.length, dtype=torch.bool).triu(1)
            self.overwrite(later.view(1, 1, *later.shape), torch.tensor(-torch.inf))
        if (mask := self.way.mask) is not None:
            value = self.lift(mask, product)
            if value.dtype == torch.bool:
                self.overwrite(~value, torch.tensor(-torch.inf))
            else:
                self.add(ScoreStep(product, product), mask)
        for step in self.way.steps:
            if less_its_peak(step.node):
                continue
            _FOLLOW[step.name](self, step)
        if bool((self.lost & ~self.hidden).any()):
            raise Unknown("a score is overwritten although its key is seen", product)
        if self.offset.isnan().any() or (self.offset == torch.inf).any():
            raise Unknown("the mask holds NaN or plus infinity", product)
        return self

    @property
    def length(self) -> int:
        return self.at.length

    @functools.cached_property
    def hidden(self) -> Tensor:
        return self.offset <= _HIDDEN

    @functools.cached_property
    def seen(self) -> Tensor:
        """Mask of the keys that each query sees, [S, S]."""
        seen = ~self.hidden
        if not torch.equal(seen, seen[:1, :1].expand_as(seen)):
            raise Unknown("the mask differs between sequences or heads", self.way.product)
        return seen[0, 0].expand(self.length, self.length)

    @functools.cached_property
    def bias(self) -> Tensor:
        """The offset where a key is seen and 0 elsewhere, [H or 1, S or 1, S or 1]."""
        bias = self.offset.masked_fill(self.hidden, 0)
        if not torch.equal(bias, bias[:1].expand_as(bias)):
            raise Unknown("the bias differs between sequences", self.way.product)
        return bias[0]

    def lift(self, value: Any, node: fx.Node) -> Tensor:
        """The value of an operand of `node`, with batch and heads as two dims."""
        value = self.at(value) if isinstance(value, fx.Node) else torch.tensor(float(value))
        sizes = self.at.shape(node)
        value = value.reshape((1,) * (len(sizes) - value.dim()) + value.shape)
        if len(sizes) == 3:
            return value.unsqueeze(0) if len(value) == 1 else value.unflatten(0, (self.at.batch, -1))
        return value

    def number(self, value: Any, node: fx.Node) -> float:
        value = self.at(value) if isinstance(value, fx.Node) else value
        if isinstance(value, Tensor) and value.numel() != 1:
            raise Unknown("the scores are scaled by more than one number", node)
        return float(value)

    def add(self, step: ScoreStep, value: Any, factor: float = 1.0) -> None:
        self.offset = self.offset + self.lift(value, step.node) * factor
        if isinstance(value, fx.Node):
            self.added += [(ScoreStep(step.node, term), factor) for term in _summands(value)]

    def multiply(self, factor: float) -> None:
        self.scale *= factor
        self.offset = self.offset * factor
        self.added = [(step, factor * f) for step, f in self.added]

    def overwrite(self, where: Tensor, value: Tensor) -> None:
        self.lost = self.lost | where
        self.offset = torch.where(where, value, self.offset)

    def terms(self) -> tuple[tuple[fx.Node, float], ...]:
        """The added terms that are no masks, each with its factor.

        Each term is [B or 1, H or 1, S or 1, S or 1].
        """
        biases = []
        for step, factor in self.added:
            visible = self.lift(step.scores, step.node).masked_fill(self.hidden, 0)
            if not bool(visible.any()):
                continue
            if len(shape(step.node)) != 4 or self.lost.any():
                raise Unknown("the scores have a bias that the attention op cannot add", step.node)
            biases.append((step.scores, factor))
        return tuple(biases)


def _summands(node: fx.Node) -> list[fx.Node]:
    """The terms of a nested sum."""
    if is_call(node, "add") and all(isinstance(a, fx.Node) for a in node.args[:2]) and arguments(node)["alpha"] == 1:
        return [term for side in node.args[:2] for term in _summands(side)]  # type: ignore[arg-type]
    return [node]


def _add(scores: Scores, step: ScoreStep) -> None:
    scores.add(step, step.other, float(arguments(step.node)["alpha"]))


def _subtract(scores: Scores, step: ScoreStep) -> None:
    if step.node.args[0] is not step.scores:
        raise Unknown("the scores are subtracted from something", step.node)
    scores.add(step, step.other, -float(arguments(step.node)["alpha"]))


def _multiply(scores: Scores, step: ScoreStep) -> None:
    if isinstance(step.other, fx.Node) and len(shape_of(step.other)) and not _is_single(step.other):
        # A mask of zeros and ones. Keys whose scores are zeroed must be hidden by a later step.
        keep = scores.lift(step.other, step.node)
        if not bool(((keep == 0) | (keep == 1)).all()):
            raise Unknown("the scores are scaled by more than one number", step.node)
        scores.overwrite(keep == 0, torch.zeros(()))
        return
    scores.multiply(_positive(scores.number(step.other, step.node), step))


def _divide(scores: Scores, step: ScoreStep) -> None:
    if step.node.args[0] is not step.scores or arguments(step.node).get("rounding_mode"):
        raise Unknown("the scores are a divisor or are divided with rounding", step.node)
    scores.multiply(1 / _positive(scores.number(step.other, step.node), step))


def _positive(factor: float, step: ScoreStep) -> float:
    if factor <= 0:
        raise Unknown("the scores are scaled by a number that is not positive", step.node)
    return factor


def _fill(scores: Scores, step: ScoreStep) -> None:
    values = arguments(step.node)
    scores.overwrite(scores.lift(values["mask"], step.node).bool(), scores.lift(values["value"], step.node))


def _choose(scores: Scores, step: ScoreStep) -> None:
    condition, a, b = step.node.args
    mask = scores.lift(condition, step.node).bool()
    if a is step.scores:
        scores.overwrite(~mask, scores.lift(b, step.node))
    else:
        scores.overwrite(mask, scores.lift(a, step.node))


def _bound_below(scores: Scores, step: ScoreStep) -> None:
    values = arguments(step.node)
    if values.get("max") is not None or scores.number(values.get("min", step.other), step.node) > _HIDDEN:
        raise Unknown("the scores are clamped", step.node)


def _cap(scores: Scores, step: ScoreStep) -> None:
    if scores.inner is not None or bool(scores.offset.any()) or bool(scores.lost.any()):
        raise Unknown("the scores are masked, biased or capped before the tanh", step.node)
    scores.inner, scores.scale = scores.scale, 1.0


def _keep(scores: Scores, step: ScoreStep) -> None:
    before, after = ([str(s) for s in shape(n)] for n in (step.scores, step.node))
    if before[-2:] != after[-2:] or len(after) not in (3, 4) or (step.name == "expand" and before != after):
        raise Unknown("the scores change their shape", step.node)


def _drop(scores: Scores, step: ScoreStep) -> None:
    if not is_off(step.node):
        raise Unknown("dropout is on", step.node)


def _is_single(node: fx.Node) -> bool:
    return all(isinstance(size, int) and size == 1 for size in shape_of(node))


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """Sizes of a tensor; the empty tuple for a number."""
    return shape(node) if isinstance(value_of(node), Tensor) else ()


_FOLLOW: dict[str, Callable[[Scores, ScoreStep], None]] = {
    "add": _add,
    "sub": _subtract,
    "mul": _multiply,
    "div": _divide,
    "masked_fill": _fill,
    "where": _choose,
    "clamp": _bound_below,
    "clamp_min": _bound_below,
    "maximum": _bound_below,
    "max": _bound_below,
    "tanh": _cap,
    "dropout": _drop,
    **dict.fromkeys(("to", "_to_copy", "type_as", "float", "contiguous", "clone", "alias"), _keep),
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "unflatten", "flatten", "squeeze", "unsqueeze"), _keep),
    **dict.fromkeys(("expand", "expand_as"), _keep),
}
