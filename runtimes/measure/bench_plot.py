"""SVG plot of a measurement: bars of the rates."""

from __future__ import annotations

from html import escape

from .bench import BenchResult
from .bench_report import conditions

# Layout of the SVG, in pixels: bar height, distance of bars, margins and the width of the scale.
_BAR = 18
_PITCH = 34
_LEFT, _SCALE, _RIGHT = 110, 420, 170


def svg(result: BenchResult, name: str) -> str:
    """Draw bars of the median rates on one scale, with the range of the runs."""
    width, height = _LEFT + _SCALE + _RIGHT, 60 + _PITCH * len(result.rates) + 60
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
        ' font-family="system-ui, sans-serif" font-size="13" fill="#1b1f24">',
        f"<title>{escape(name)}: tokens per second</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="16" y="28" font-size="15" font-weight="600">{escape(name)}</text>',
        f'<text x="{_LEFT}" y="48" fill="#57606a">tokens per second; the line spans all runs</text>',
    ]
    # All bars share one scale: a longer bar is always a faster test.
    unit = _SCALE / max(rate.max for rate in result.rates)
    for i, rate in enumerate(result.rates):
        top = 60 + _PITCH * i
        middle = top + _BAR / 2
        low, high = _LEFT + rate.min * unit, _LEFT + rate.max * unit
        parts += [
            f'<text x="{_LEFT - 10}" y="{middle + 4.5:.1f}" text-anchor="end">{rate.test}</text>',
            f'<rect x="{_LEFT}" y="{top}" width="{rate.median * unit:.1f}" height="{_BAR}" rx="2" fill="#4878b0"/>',
            f'<path d="M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 4}v8M{high:.1f} {middle - 4}v8"'
            ' stroke="#1b1f24" stroke-width="1.5" fill="none"/>',
            f'<text x="{high + 10:.1f}" y="{middle + 4.5:.1f}">{rate.median:,.1f}</text>',
        ]
    latencies = [
        f"{title} {latency.p50:,.1f} ms" + (f" (p99 {latency.p99:,.1f})" if latency.p99 is not None else "")
        for title, latency in (("first token", result.ttft_ms), ("each next token", result.tpot_ms))
        if latency
    ]
    for i, line in enumerate([", ".join(latencies), conditions(result)]):
        parts.append(f'<text x="16" y="{height - 36 + 20 * i}" fill="#57606a">{escape(line)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
