"""SVG plot of an evaluation: KL divergence over all tokens, and by position."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

import numpy as np

from .evaluate import Evaluation

# Layout, in pixels: the page, a panel's width and vertical edges, and the left edges of the two panels.
_WIDTH, _HEIGHT = 880, 372
_PANEL, _TOP, _BOTTOM = 350, 92, 298
_LEFTS = (64, 500)
_POINTS = 200
# Values more than this many powers of ten below the largest are drawn at the lower edge.
_DECADES = 8
_LINE, _GREY, _GRID = "#4878b0", "#57606a", "#d8dee4"
_MARKED = ((50, "median"), (90, "p90"), (99, "p99"))


def svg(result: Evaluation, name: str) -> str:
    """Draw two panels: sorted divergences (logarithmic), and means by position.

    Args:
        result: an evaluation with a reference.
        name: the title.
    """
    kld = result.scores.kld
    assert kld is not None and result.kld is not None, "the evaluation has no reference"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
        ' font-family="system-ui, sans-serif" font-size="13" fill="#1b1f24">',
        f"<title>{escape(name)}: divergence from the reference</title>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        f'<text x="16" y="28" font-size="15" font-weight="600">{escape(name)}</text>',
        f'<text x="16" y="48" fill="{_GREY}">KL divergence from the reference, nats</text>',
        *_by_rank(kld),
        *_by_position(result),
        f'<text x="16" y="{_HEIGHT - 16}" fill="{_GREY}">{escape(_summary(result))}</text>',
    ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _by_rank(kld: np.ndarray) -> list[str]:
    left, scale = _LEFTS[0], _logarithmic(kld)
    shares = np.linspace(0, 100, _POINTS)
    points = [
        (left + share * _PANEL / 100, scale(y)) for share, y in zip(shares, np.percentile(kld, shares), strict=True)
    ]
    parts = [*_frame(left, "all tokens, in order", scale), _path(points)]
    for share in (0, 25, 50, 75, 100):
        parts.append(_below(left + share * _PANEL / 100, f"{share}%"))
    for share, label in _MARKED:
        x, value = left + share * _PANEL / 100, float(np.percentile(kld, share))
        parts += [
            f'<circle cx="{x:.1f}" cy="{scale(value):.1f}" r="3.5" fill="#1b1f24"/>',
            f'<text x="{x - 8:.1f}" y="{scale(value) - 6:.1f}" text-anchor="end">{label} {value:.2g}</text>',
        ]
    return parts


def _by_position(result: Evaluation) -> list[str]:
    left, bins = _LEFTS[1], result.by_position()
    scale, unit = _linear(max(bin_["kld"] for bin_ in bins)), _PANEL / bins[-1]["to"]
    parts = _frame(left, "mean by the number of tokens before", scale)
    for bin_ in bins:
        x, y = left + bin_["from"] * unit, scale(bin_["kld"])
        width = max(1.0, (bin_["to"] - bin_["from"]) * unit - 2)
        parts.append(
            f'<rect x="{x + 1:.1f}" y="{y:.1f}" width="{width:.1f}" height="{_BOTTOM - y:.1f}" rx="1" fill="{_LINE}"/>'
        )
    for position in (0, bins[-1]["to"] // 2, bins[-1]["to"]):
        parts.append(_below(left + position * unit, f"{position:,}"))
    return parts


class _Scale:
    """Maps values to y coordinates between the lower and the upper edge of a panel.

    Args:
        ticks: values that get a grid line; the first is at the lower edge, the last at the upper.
        transform: applied before the linear map, such as the logarithm.
    """

    def __init__(self, ticks: Sequence[float], transform: Callable[[float], float]) -> None:
        self.ticks, self._transform = ticks, transform
        self._low, self._high = transform(ticks[0]), transform(ticks[-1])

    def __call__(self, value: float) -> float:
        share = (self._transform(value) - self._low) / (self._high - self._low)
        return _BOTTOM - max(share, 0.0) * (_BOTTOM - _TOP)


def _logarithmic(values: np.ndarray) -> _Scale:
    """Make a logarithmic scale for the positive values; ticks at powers of ten."""
    positive = values[values > 0]
    top, least = (float(positive.max()), float(positive.min())) if len(positive) else (1.0, 0.1)
    high = math.ceil(math.log10(top))
    low = min(max(math.floor(math.log10(least)), high - _DECADES), high - 1)
    return _Scale([10.0**power for power in range(low, high + 1)], lambda v: math.log10(v) if v > 0 else low)


def _linear(top: float) -> _Scale:
    """Make a linear scale from 0, with two to five round steps."""
    unit = 10.0 ** math.floor(math.log10(top or 1.0))
    step = next(unit * part for part in (0.2, 0.5, 1, 2, 5) if unit * part * 5 >= top)
    return _Scale([step * i for i in range(max(2, math.ceil(top / step)) + 1)], lambda v: v)


def _frame(left: float, title: str, scale: _Scale) -> list[str]:
    parts = [f'<text x="{left}" y="{_TOP - 16}" font-weight="600">{title}</text>']
    for tick in scale.ticks:
        y = scale(tick)
        parts += [
            f'<path d="M{left} {y:.1f}H{left + _PANEL}" stroke="{_GRID}" fill="none"/>',
            f'<text x="{left - 8}" y="{y + 4.5:.1f}" text-anchor="end" fill="{_GREY}">{tick:.3g}</text>',
        ]
    return parts


def _path(points: Sequence[tuple[float, float]]) -> str:
    line = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path d="M{line}" stroke="{_LINE}" stroke-width="2" fill="none"/>'


def _below(x: float, label: str) -> str:
    return f'<text x="{x:.1f}" y="{_BOTTOM + 20}" text-anchor="middle" fill="{_GREY}">{label}</text>'


def _summary(result: Evaluation) -> str:
    assert result.kld and result.ratio and result.same_top1
    error = "" if result.kld.stderr is None else f" ± {result.kld.stderr:.2g}"
    return (
        f"{result.tokens:,} tokens: mean {result.kld.mean:.3g}{error}, largest {result.kld.max:.3g}; perplexity "
        f"{result.perplexity.value:.4g}, {result.ratio.value:.4f} of the reference's; "
        f"same best token {result.same_top1.value:.1%}"
    )
