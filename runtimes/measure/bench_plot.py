"""SVG plot of a measurement: bars of the rates."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .bench import BenchResult, Rate
from .bench_report import conditions

# Layout, in pixels: bar height, distances of bars and of groups, margins, the width of the scale, and that of a letter.
_BAR, _PITCH, _GROUP = 18, 34, 30
_LEFT, _SCALE, _RIGHT = 110, 420, 170
_LETTER = 7.5
_GREY = "#57606a"
# One color for each artifact, which can be told apart without red and green.
_COLORS = ("#4878b0", "#d1782a", "#7a5195", "#3a8f85")


def svg(results: Sequence[tuple[str, BenchResult]]) -> str:
    """Draw bars of the median rates on one scale, with the range of the runs.

    The bars of several artifacts are in groups, one for each test.

    Args:
        results: by the name of an artifact.
    """
    several = len(results) > 1
    title = "speed by artifact" if several else results[0][0]
    left = max(_LEFT, *(26 + int(_LETTER * len(name)) for name, _ in results)) if several else _LEFT
    # All bars share one scale: a longer bar is always a faster test.
    unit = _SCALE / max(rate.max for _, result in results for rate in result.rates)
    bars, top = [], 60
    for index, first in enumerate(results[0][1].rates):
        if several:
            bars.append(f'<text x="16" y="{top + 16}" font-weight="600">{first.test}</text>')
            top += _GROUP
        for which, (name, result) in enumerate(results):
            rate, color = result.rates[index], _COLORS[which % len(_COLORS)]
            bars += _bar(rate, name if several else rate.test, top, left, unit, color)
            top += _PITCH
    notes = _notes(results)
    width, height = left + _SCALE + _RIGHT, top + 20 + 20 * len(notes)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
        ' font-family="system-ui, sans-serif" font-size="13" fill="#1b1f24">',
        f"<title>{escape(', '.join(name for name, _ in results))}: tokens per second</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="16" y="28" font-size="15" font-weight="600">{escape(title)}</text>',
        f'<text x="{left}" y="48" fill="{_GREY}">tokens per second; the line spans all runs</text>',
        *bars,
        *(f'<text x="16" y="{top + 24 + 20 * i}" fill="{_GREY}">{escape(note)}</text>' for i, note in enumerate(notes)),
    ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _bar(rate: Rate, label: str, top: int, left: int, unit: float, color: str) -> list[str]:
    middle = top + _BAR / 2
    low, high = left + rate.min * unit, left + rate.max * unit
    return [
        f'<text x="{left - 10}" y="{middle + 4.5:.1f}" text-anchor="end">{escape(label)}</text>',
        f'<rect x="{left}" y="{top}" width="{rate.median * unit:.1f}" height="{_BAR}" rx="2" fill="{color}"/>',
        f'<path d="M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 4}v8M{high:.1f} {middle - 4}v8"'
        ' stroke="#1b1f24" stroke-width="1.5" fill="none"/>',
        f'<text x="{high + 10:.1f}" y="{middle + 4.5:.1f}">{rate.median:,.1f}</text>',
    ]


def _notes(results: Sequence[tuple[str, BenchResult]]) -> list[str]:
    """Return lines for the space below the bars: latencies of one artifact, and the conditions."""
    result = results[0][1]
    latencies = [
        f"{title} {latency.p50:,.1f} ms" + (f" (p99 {latency.p99:,.1f})" if latency.p99 is not None else "")
        for title, latency in (("first token", result.ttft_ms), ("each next token", result.tpot_ms))
        if latency and len(results) == 1
    ]
    return [*([", ".join(latencies)] if latencies else []), conditions([result for _, result in results])]
