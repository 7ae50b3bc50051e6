"""Which attention the steps between two products are: its scale, cap, mask rule, alibi slopes and bias."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ...kernels.ops.attention_mask import MaskRule, fit_rule, fit_slopes, is_alibi
from .attention_scores import Scores, Way
from .token_independent import Statics, Unknown

_LONGEST = 5000


@dataclass(frozen=True)
class Meaning:
    """What the steps come to, in the terms of the attention op; `bias` is terms with their factors."""

    scale: float
    softcap: float | None
    rule: MaskRule
    slopes: Tensor | None
    bias: tuple[tuple[fx.Node, float], ...]


def find_meaning(way: Way, statics: Statics) -> Meaning:
    """What the steps do to the scores at every length that is served; raises `Unknown` where that is no attention."""
    sides = [n for n in way.sides if n in statics]
    found = [Scores(statics.at(*size), way).follow() for size in sizes_to_look_at(sides, statics)]
    last = found[-1]
    if any(not math.isclose(f.scale, last.scale) or f.inner != last.inner for f in found):
        raise Unknown("the scale depends on the length", way.product)
    rule = fit_rule(last.seen)
    if rule is None:
        raise Unknown("the mask is neither causal, a window nor chunks", way.product)
    for f in found:
        positions = torch.arange(f.length)
        if not torch.equal(f.seen, rule.sees(positions, positions)):
            raise Unknown("the mask follows another rule at another length", way.product)
    slopes = fit_slopes(last.bias, last.seen)
    precision = max(torch.finfo(d).eps for d in [torch.float32, *_dtypes(sides, statics)])
    is_linear = all(is_alibi(f.bias, f.seen, slopes, precision) for f in found)
    return Meaning(
        scale=last.scale if last.inner is None else last.scale * last.inner,
        softcap=None if last.inner is None else last.scale,
        rule=rule,
        slopes=slopes if is_linear and bool(slopes.any()) else None,
        bias=() if is_linear else last.terms(),
    )


def sizes_to_look_at(sides: list[fx.Node], statics: Statics) -> list[tuple[int, int]]:
    """Batches and lengths: small ones, and one beyond every window that these nodes may speak of."""
    numbers = [48]
    for node in statics.cone(sides):
        if weight := statics.program.weight_of(node):
            spoken: list[Any] = [*weight.shape, *(weight.evaluate().flatten().tolist() if weight.numel <= 16 else [])]
        else:
            spoken = pytree.tree_leaves((node.args, node.kwargs))
        numbers += [int(n) for n in spoken if _may_be_a_window(n)]
    longest = min(statics.program.max_seq_len, max(n + n // 4 for n in numbers))
    if longest > _LONGEST:
        raise Unknown(f"the mask would have to be looked at over {longest} positions", sides[0])
    return [*((2, n) for n in (1, 7, 18) if n < longest), (1, longest)]


def _may_be_a_window(value: object) -> bool:
    return isinstance(value, (int, float)) and 1 < value < 2**31 and value == int(value)


def _dtypes(sides: list[fx.Node], statics: Statics) -> set[torch.dtype]:
    values = [n.meta["val"] for n in statics.cone(sides)]
    return {v.dtype for v in values if isinstance(v, Tensor) and v.dtype.is_floating_point}
