"""Find the scale, softcap, mask, slopes and bias of a spelled-out attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ...ir.nodes import value_of
from ...kernels.ops.attention_mask import MaskRule, fit_rule, fit_slopes, is_alibi
from .attention_scores import Scores, Way
from .token_independent import TokenIndependentValues, Unknown

_LONGEST = 5000


@dataclass(frozen=True)
class Meaning:
    """The arguments of the attention op that the steps on the scores stand for.

    Attributes:
        bias: terms to add to the scores, each with its factor.
    """

    scale: float
    softcap: float | None
    rule: MaskRule
    slopes: Tensor | None
    bias: tuple[tuple[fx.Node, float], ...]


def find_meaning(way: Way, independent: TokenIndependentValues) -> Meaning:
    """Find the attention that the steps stand for at every supported length.

    The steps are evaluated at several lengths. Raises `Unknown` if they are no attention of the dialect, or not the
    same one at each length.
    """
    sides = [n for n in way.sides if n in independent]
    samples = [Scores(independent.at(*size), way).follow() for size in sizes_to_look_at(sides, independent)]
    last = samples[-1]
    if any(not math.isclose(s.scale, last.scale) or s.inner != last.inner for s in samples):
        raise Unknown("the scale depends on the length", way.product)
    rule = fit_rule(last.seen)
    if rule is None:
        raise Unknown("the mask is neither causal, a window nor chunks", way.product)
    for sample in samples:
        positions = torch.arange(sample.length)
        if not torch.equal(sample.seen, rule.sees(positions, positions)):
            raise Unknown("the mask follows different rules at different lengths", way.product)
    slopes = fit_slopes(last.bias, last.seen)
    precision = max(torch.finfo(d).eps for d in [torch.float32, *_dtypes(sides, independent)])
    is_linear = all(is_alibi(s.bias, s.seen, slopes, precision) for s in samples)
    return Meaning(
        scale=last.scale if last.inner is None else last.scale * last.inner,
        softcap=None if last.inner is None else last.scale,
        rule=rule,
        slopes=slopes if is_linear and bool(slopes.any()) else None,
        bias=() if is_linear else last.terms(),
    )


def sizes_to_look_at(sides: list[fx.Node], independent: TokenIndependentValues) -> list[tuple[int, int]]:
    """The (batch, length) pairs at which to evaluate a mask or bias.

    The last length exceeds every window that `sides` may define, up to `max_seq_len`: every number among the call
    arguments, weight sizes and small weights that they depend on. Raises `Unknown` if that is too long to evaluate.
    """
    numbers = [48]
    for node in independent.cone(sides):
        if weight := independent.program.weight_of(node):
            values: list[Any] = [*weight.shape, *(weight.evaluate().flatten().tolist() if weight.numel <= 16 else [])]
        else:
            values = pytree.tree_leaves((node.args, node.kwargs))
        numbers += [int(n) for n in values if _may_be_a_window(n)]
    longest = min(independent.program.max_seq_len, max(n + n // 4 for n in numbers))
    if longest > _LONGEST:
        raise Unknown(f"the mask would have to be evaluated at {longest} positions, more than {_LONGEST}", sides[0])
    return [*((2, n) for n in (1, 7, 18) if n < longest), (1, longest)]


def _may_be_a_window(value: object) -> bool:
    return isinstance(value, (int, float)) and 1 < value < 2**31 and value == int(value)


def _dtypes(sides: list[fx.Node], independent: TokenIndependentValues) -> set[torch.dtype]:
    values = [value_of(n) for n in independent.cone(sides)]
    return {v.dtype for v in values if isinstance(v, Tensor) and v.dtype.is_floating_point}
