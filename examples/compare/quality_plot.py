"""Plot divergence against size as SVG, with one labeled dot per candidate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 880, 560
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 850, 92, 500
_GREY, _GRID, _INK = "#57606a", "#d8dee4", "#1b1f24"
# Colors that can be told apart without red and green. One dot shape is enough, because every dot has a label.
_COLOURS = ("#4878b0", "#d1782a", "#7a5195", "#3a8f85")
_LETTER, _LINE = 7.0, 15.0  # approximate width and height of a character at 12 pixels
_DOT = 4.0


@dataclass(frozen=True)
class Point:
    """A dot: engine, format, size, and the mean divergence with its standard error."""

    group: str
    label: str
    bytes: int
    kld: float
    stderr: float | None


@dataclass(frozen=True)
class Box:
    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """Area of the intersection."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(width, 0.0) * max(height, 0.0)


def svg(points: Sequence[Point], title: str, note: str) -> str:
    """Draw one or more points.

    The x axis is the size; the y axis is the divergence, on a logarithmic scale.
    """
    xs, ys = _sizes(points), _powers(points)

    def x(value: float) -> float:
        return _LEFT + (value - xs[0]) / (xs[-1] - xs[0]) * (_RIGHT - _LEFT)

    def y(value: float) -> float:
        share = (math.log10(max(value, ys[0])) - math.log10(ys[0])) / (math.log10(ys[-1]) - math.log10(ys[0]))
        return _BOTTOM - share * (_BOTTOM - _TOP)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
        f' font-family="system-ui, sans-serif" font-size="13" fill="{_INK}">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        f'<text x="16" y="28" font-size="15" font-weight="600">{escape(title)}</text>',
        f'<text x="16" y="48" fill="{_GREY}">{escape(note)}</text>',
    ]
    for tick in ys:
        parts += [
            f'<path d="M{_LEFT} {y(tick):.1f}H{_RIGHT}" stroke="{_GRID}" fill="none"/>',
            f'<text x="{_LEFT - 8}" y="{y(tick) + 4.5:.1f}" text-anchor="end" fill="{_GREY}">{tick:g}</text>',
        ]
    for tick in xs:
        parts.append(f'<text x="{x(tick):.1f}" y="{_BOTTOM + 20}" text-anchor="middle" fill="{_GREY}">{tick:g}</text>')
    parts.append(f'<text x="{_RIGHT}" y="{_BOTTOM + 42}" text-anchor="end" fill="{_GREY}">MB on disk</text>')

    groups = list(dict.fromkeys(point.group for point in points))
    colours = {group: _COLOURS[i % len(_COLOURS)] for i, group in enumerate(groups)}
    left = float(_LEFT)
    for group in groups:
        parts.append(f'<circle cx="{left + _DOT:.1f}" cy="70" r="{_DOT}" fill="{colours[group]}"/>')
        parts.append(f'<text x="{left + 14:.1f}" y="74.5">{escape(group)}</text>')
        left += 34 + _LETTER * len(group)

    dots = [(x(point.bytes / 1e6), y(point.kld)) for point in points]
    for point, (across, down) in zip(points, dots, strict=True):
        if point.stderr:
            high, low = y(point.kld + point.stderr), y(max(point.kld - point.stderr, 0))
            parts.append(f'<path d="M{across:.1f} {high:.1f}V{low:.1f}" stroke="{colours[point.group]}"/>')
        parts.append(f'<circle cx="{across:.1f}" cy="{down:.1f}" r="{_DOT}" fill="{colours[point.group]}"/>')
    boxes = place_labels(dots, [point.label for point in points])
    for point, (across, _), box in zip(points, dots, boxes, strict=True):
        # The real text width differs from the box's, so the label is anchored at the side next to its dot.
        anchor_x, anchor = (box.left, "start") if box.left > across else (box.right, "end")
        if box.left <= across <= box.right:
            anchor_x, anchor = across, "middle"
        position = f'x="{anchor_x:.1f}" y="{box.bottom - 3.5:.1f}" text-anchor="{anchor}"'
        parts.append(f'<text {position} font-size="12" fill="{colours[point.group]}">{escape(point.label)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def place_labels(dots: Sequence[tuple[float, float]], labels: Sequence[str]) -> list[Box]:
    """Place each label next to its dot.

    The position is the one that covers the smallest area of other dots and labels.
    """
    taken = [Box(x - _DOT, y - _DOT, x + _DOT, y + _DOT) for x, y in dots]
    placed = []
    for (x, y), label in zip(dots, labels, strict=True):
        width, gap = _LETTER * len(label), _DOT + 3
        choices = [
            Box(left, top, left + width, top + _LINE)
            for top in (y - _LINE / 2, y - _LINE - 2, y + 2)
            for left in (x + gap, x - gap - width)
        ]
        choices += [Box(x - width / 2, top, x + width / 2, top + _LINE) for top in (y - gap - _LINE, y + gap)]
        frame = Box(_LEFT, _TOP, _WIDTH, _BOTTOM)
        best = min(choices, key=lambda box: sum(map(box.overlap, taken)) + 10 * _outside(box, frame))
        taken.append(best)
        placed.append(best)
    return placed


def _outside(box: Box, frame: Box) -> float:
    return (box.right - box.left) * (box.bottom - box.top) - box.overlap(frame)


def _powers(points: Sequence[Point]) -> list[float]:
    """Powers of ten around all divergences, for the y axis.

    A divergence of 0 is drawn at the lower edge.
    """
    positive = [point.kld for point in points if point.kld > 0] or [1.0]
    low = math.floor(math.log10(min(positive)))
    high = max(math.ceil(math.log10(max(positive))), low + 1)
    return [10.0**power for power in range(low, high + 1)]


def _sizes(points: Sequence[Point]) -> list[float]:
    """Round numbers of megabytes around all sizes, for the x axis.

    They have four to eight steps.
    """
    sizes = [point.bytes / 1e6 for point in points]
    span = max(max(sizes) - min(sizes), 1.0)
    unit = 10.0 ** math.floor(math.log10(span))
    step = next(unit * part for part in (0.2, 0.5, 1, 2) if span / (unit * part) <= 6)
    first, last = math.floor(min(sizes) / step), math.ceil(max(sizes) / step)
    return [step * i for i in range(first, max(last, first + 1) + 1)]
