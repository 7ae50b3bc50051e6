"""Draw some steps of a trace that `llmc bench DIR --workload N --trace TRACE.json` wrote.

    python examples/draw_trace.py TRACE.json --steps 3 -o steps.svg

The picture has the tracks of the trace: steps with the engine's calls and runs, and below them the requests that take
part in these steps.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

# Layout, in pixels: the page, the left and right edges of the tracks, and the height and the distance of their rows.
WIDTH, LEFT, RIGHT = 1000, 116, 984
TOP, ROW, PITCH, GAP = 84, 22, 26, 16
LETTER = 6.4  # approximate width of a character of a label
INK, GREY, GRID = "#1b1f24", "#57606a", "#d8dee4"
COLORS = {
    "step": "#d8dee4",
    "schedule": "#7a5195",
    "forward": "#4878b0",
    "sample": "#b0457a",
    "run": "#9dbde3",
    "copy slot": "#1b1f24",
    "open slots": "#1b1f24",
    "waiting": "#eceff2",
    "prompt": "#e0a458",
    "token": "#a9d6cc",
}
DARK = {"schedule", "forward", "sample", "copy slot", "open slots"}  # their labels are white
# The rows of the track of steps; later slices are drawn over earlier ones.
ROWS = {"steps": ("step",), "calls": ("schedule", "forward", "sample", "copy slot", "open slots"), "runs": ("run",)}


class Slice(NamedTuple):
    """A slice of a trace; times in ms."""

    track: str
    name: str
    began: float
    ended: float
    args: dict[str, Any]


class Window(NamedTuple):
    """The time that is drawn, in ms."""

    began: float
    ended: float

    @property
    def duration(self) -> float:
        return self.ended - self.began

    def x(self, at: float) -> float:
        """Return the place of a time on the page; times outside of the window are at its edges."""
        inside = min(max(at, self.began), self.ended)
        return LEFT + (inside - self.began) / self.duration * (RIGHT - LEFT)


def read(path: Path) -> list[Slice]:
    """Read the slices of a trace, in order."""
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    return [
        Slice(names[e["pid"], e["tid"]], e["name"], e["ts"] / 1000, (e["ts"] + e["dur"]) / 1000, e["args"])
        for e in events
        if e["ph"] == "X"
    ]


def choose(steps: Sequence[Slice], count: int) -> int:
    """Return the first of `count` steps that show most.

    These are a step in which sequences only decode, and then one that also computes tokens of a prompt; the more
    sequences decode, the better.
    """

    def merit(first: int) -> tuple[bool, bool, int]:
        *before, shown = (step.args for step in steps[first : first + min(count, 2)])
        decoding = min(args["decoding"] for args in (*before, shown))
        return shown["prompt_tokens"] > 0 < decoding, not any(args["prompt_tokens"] for args in before), decoding

    return max(range(max(1, len(steps) - count + 1)), key=merit)


def svg(trace: Sequence[Slice], count: int, first: int | None = None) -> str:
    """Draw `count` steps of a trace, by default those that show most."""
    steps = [one for one in trace if one.name == "step"]
    first = choose(steps, count) if first is None else first
    drawn = steps[first : first + count]
    if not drawn:
        raise SystemExit(f"The trace has {len(steps)} steps. Give a smaller --first.")
    window = Window(drawn[0].began, drawn[-1].ended)
    inside = [one for one in trace if one.ended > window.began and one.began < window.ended]
    parts, y = [], TOP
    for row, names in ROWS.items():
        boxes = [one for one in inside if one.track == "steps" and one.name in names]
        if boxes:  # not every engine reports its runs
            parts += _row(row, boxes, y, window)
            y += PITCH
    y += GAP
    tracks = [one.track for one in inside if one.name in ("prompt", "token")]
    for track in sorted(dict.fromkeys(tracks), key=lambda name: int(name.split()[-1])):
        boxes = [one for one in inside if one.track == track and one.name != track]
        parts += _row(track, boxes, y, window)
        # The slice of a whole request has its name.
        parts += [_dot(window.x(one.ended), y) for one in inside if one.name == track and one.ended <= window.ended]
        y += PITCH
    shown = f"steps {first} to {first + len(drawn) - 1}" if len(drawn) > 1 else f"step {first}"
    return _page(f"{shown} of a workload", parts, y, window, _times(inside))


def _times(slices: Sequence[Slice]) -> dict[str, float]:
    """Return how long the slices of each name take together, in the order of the legend."""
    found = {name: sum(one.ended - one.began for one in slices if one.name == name) for name in COLORS}
    return {name: ms for name, ms in found.items() if ms}


def _row(name: str, boxes: Sequence[Slice], y: float, window: Window) -> list[str]:
    parts = [f'<text x="{LEFT - 10}" y="{y + 15.5:.1f}" text-anchor="end">{escape(name)}</text>']
    for box in boxes:
        left = window.x(box.began)
        # Short slices are drawn so wide that they can be seen.
        width = max(window.x(box.ended) - left, 1.5)
        label = next((text for text in _labels(box) if LETTER * len(text) + 8 <= width), "")
        parts += [
            f'<rect x="{left:.2f}" y="{y}" width="{width:.2f}" height="{ROW}" fill="{COLORS[box.name]}"'
            f' stroke="#ffffff" stroke-width="0.5"><title>{escape(_labels(box)[0])}</title></rect>'
        ]
        if label:
            color = "#ffffff" if box.name in DARK else INK
            x = left + width / 2
            parts.append(
                f'<text x="{x:.1f}" y="{y + 15:.1f}" font-size="12" text-anchor="middle" fill="{color}">{label}</text>'
            )
    return parts


def _labels(box: Slice) -> list[str]:
    """Return the labels of a slice, the longest first."""
    args, ms = box.args, f"{box.ended - box.began:.3g} ms"
    if box.name == "step":
        counts = {"decoding sequence": args["decoding"], "prompt token": args["prompt_tokens"]}
        what = ", ".join(_count(number, noun) for noun, number in counts.items() if number)
        return [f"step: {what}, {ms}", what, _count(args["tokens"], "token")]
    if box.name == "forward":
        size = f"{_count(args['sequences'], 'sequence')}, {_count(args['tokens'], 'token')}"
        return [f"forward: {size}, {_count(args['runs'], 'run')}, {ms}", f"forward: {size}", "forward"]
    if box.name == "run":
        lengths = args["tokens_per_sequence"]
        short = f"{len(lengths)} x {lengths[0]}" if len({*lengths}) == 1 else f"{len(lengths)} sequences"
        each = f"{_count(sum(lengths), 'token')} of {_count(len(lengths), 'sequence')}"
        return [f"run: {each}, {ms}", f"run: {each}", short]
    if box.name == "prompt":
        return [f"prompt: {_count(args['tokens'], 'token')}", "prompt"]
    return [box.name]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s'[: number > 1]}"


def _dot(x: float, y: float) -> str:
    return f'<circle cx="{x - 7:.1f}" cy="{y + ROW / 2}" r="3.5" fill="{INK}"/>'


def _page(title: str, parts: Sequence[str], bottom: float, window: Window, times: Mapping[str, float]) -> str:
    height = bottom + 84
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
        f' font-family="system-ui, sans-serif" font-size="13" fill="{INK}">',
        f"<title>{title}</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="16" y="28" font-size="15" font-weight="600">{title}</text>',
        f'<text x="16" y="50" fill="{GREY}">the scheduler\'s steps with the calls of the engine, and the requests that '
        "take part in them; a dot marks the last token of a request</text>",
        *_axis(bottom, window),
        *parts,
        *_legend(bottom + 54, times),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _axis(bottom: float, window: Window) -> Iterator[str]:
    """Draw grid lines at round times since the beginning of the window, at most 12."""
    size = 10.0 ** math.floor(math.log10(window.duration))
    step = next(size * part for part in (0.1, 0.2, 0.5, 1) if size * part * 12 >= window.duration)
    for tick in range(math.floor(window.duration / step) + 1):
        x = window.x(window.began + tick * step)
        yield f'<path d="M{x:.1f} {TOP - 8}V{bottom}" stroke="{GRID}" fill="none"/>'
        yield f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle" fill="{GREY}">{tick * step:g}</text>'
    yield f'<text x="{LEFT - 10}" y="{bottom + 18}" text-anchor="end" fill="{GREY}">ms</text>'


def _legend(y: float, times: Mapping[str, float]) -> Iterator[str]:
    """Draw the colors, and how long the slices of the scheduler take in these steps together."""
    x = 16.0
    for name in times:
        if name == "step":  # its slices are labeled
            continue
        label = name if name in ("waiting", "prompt", "token") else f"{name} {times[name]:.3g} ms"
        yield f'<rect x="{x:.1f}" y="{y}" width="14" height="14" fill="{COLORS[name]}" stroke="{GRID}"/>'
        yield f'<text x="{x + 20:.1f}" y="{y + 12}" fill="{GREY}">{label}</text>'
        x += 36 + 7 * len(label)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw some steps of a trace as SVG.")
    parser.add_argument("trace", type=Path, metavar="TRACE.json", help="a trace of llmc bench --workload --trace")
    parser.add_argument("--steps", type=int, default=3, help="number of steps (3)")
    parser.add_argument("--first", type=int, help="number of the first step, from 0; by default one that shows most")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the picture")
    args = parser.parse_args()
    args.output.write_text(svg(read(args.trace), args.steps, args.first), encoding="utf-8")


if __name__ == "__main__":
    main()
