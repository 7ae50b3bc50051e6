"""Write measurements as a Markdown table, and put the table into a page."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OURS = "llmc"
# Minimum share of next tokens that must agree with transformers, by bits. Random weights give flat logits, whose argmax
# often changes with 4 bits. With wrong weights, or a wrong order of rope's channels, no token agrees.
_MIN_AGREEMENT = {4: 1 / 16, 8: 1 / 2}


@dataclass(frozen=True)
class Row:
    """One engine with one format, and the printed results of each round."""

    bits: int
    format: str
    rounds: Sequence[dict[str, Any]]

    @property
    def engine(self) -> str:
        return self.rounds[0]["engine"]

    def speeds(self, test: str) -> list[float]:
        """Tokens per second of each round: the median of its repeats."""
        return [statistics.median(one[test]) for one in self.rounds]

    def speed(self, test: str) -> float:
        return statistics.median(self.speeds(test))

    def agreeing(self, expected: Sequence[int]) -> int:
        """Count the next tokens that agree with transformers in float32.

        Each follows the same text; the worst round counts.
        """
        return min(sum(a == b for a, b in zip(one["following"], expected, strict=True)) for one in self.rounds)


def table(rows: Sequence[Row], expected: Sequence[int], prompt: int, tokens: int) -> str:
    """Build a Markdown table.

    Entries with equal bits are grouped and compared with the best peer of their group.
    """
    head = ["engine", "version", "format", "MB", f"pp{prompt} tok/s", f"tg{tokens} tok/s"]
    head += ["pp, to best peer", "tg, to best peer", "load s", "peak MB", f"next token as fp32, of {len(expected)}"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|---|" + "--:|" * (len(head) - 3)]
    for row in sorted(rows, key=lambda row: row.bits):
        peers = [other for other in rows if other.bits == row.bits and other.engine != OURS]
        first = row.rounds[0]
        cells = [row.engine, first["version"], row.format, f"{first['bytes'] / 1e6:.0f}"]
        cells += [_with_range(row, test) for test in ("pp", "tg")]
        cells += [_relation(row, peers, test) for test in ("pp", "tg")]
        cells += [f"{_median(row, 'load_s'):.1f}", f"{_median(row, 'peak_rss') / 1e6:.0f}", str(row.agreeing(expected))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def context_table(rows: Sequence[Row]) -> str:
    """Build a Markdown table of decode speeds by the length of the context, each with its ratio to the best peer.

    Entries with equal bits are grouped and compared with the best peer of their group.
    """
    lengths = list(rows[0].rounds[0]["at"])
    head = ["engine", "format", "MB", *(f"{length}" for length in lengths)]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "--:|" * (len(head) - 2)]
    flat = [(row, Row(row.bits, row.format, [{**one, **one["at"]} for one in row.rounds])) for row in rows]
    for row, each in sorted(flat, key=lambda pair: pair[0].bits):
        peers = [other for _, other in flat if other.bits == row.bits and other.engine != OURS]
        relations = (
            f"{_with_range(each, length)}, {_relation(each, peers, length)}".rstrip(", ") for length in lengths
        )
        lines.append(
            "| " + " | ".join([row.engine, row.format, f"{row.rounds[0]['bytes'] / 1e6:.0f}", *relations]) + " |"
        )
    return "\n".join(lines)


def serving_table(measured: Sequence[tuple[int, Row]]) -> str:
    """Build a Markdown table of engines that serve many requests.

    Entries with equal bits and equal concurrency are grouped and compared with the best peer of their group.

    Args:
        measured: concurrency, and the results at it.
    """
    head = ["requests at once", "engine", "format", "tokens/s", "to best peer", "seconds", "first token, p50 ms"]
    lines = ["| " + " | ".join(head) + " |", "|--:|---|---|" + "--:|" * (len(head) - 3)]
    for concurrency, row in sorted(measured, key=lambda one: (one[1].bits, one[0])):
        group = [other for count, other in measured if count == concurrency and other.bits == row.bits]
        peers = [other for other in group if other.engine != OURS]
        cells = [str(concurrency), row.engine, row.format, _with_range(row, "tokens_per_s")]
        cells += [_relation(row, peers, "tokens_per_s"), f"{_median(row, 'seconds'):.1f}"]
        cells += [f"{_median(row, 'ttft_ms'):.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def refuse_other_weights(row: Row, expected: Sequence[int]) -> None:
    """Stop if too few of an engine's next tokens agree with the model.

    Such an engine runs other weights.
    """
    if row.agreeing(expected) < _MIN_AGREEMENT[row.bits] * len(expected):
        raise SystemExit(
            f"{row.engine} {row.format} agrees with the float32 model on {row.agreeing(expected)} of {len(expected)} "
            "next tokens: it doesn't run the same weights, so its speed can't be compared."
        )


def replace_section(page: Path, text: str, name: str = "compare") -> None:
    """Replace the text between a page's two markers of this name.

    The rest of the page is unchanged.
    """
    before, after = around_section(page, name)
    begin, end = markers(name)
    page.write_text(f"{before}{begin}\n{text.strip()}\n{end}{after}")


def around_section(page: Path, name: str = "compare") -> tuple[str, str]:
    """Return the text before and after a page's two markers of this name.

    A page without them is refused.
    """
    begin, end = markers(name)
    before, _, rest = page.read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{page} has no markers for the table: add the lines {begin} and {end}.")
    return before, after


def markers(name: str) -> tuple[str, str]:
    """Return the lines around a generated section."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def _with_range(row: Row, test: str) -> str:
    values = row.speeds(test)
    return f"{row.speed(test):.0f} ({min(values):.0f} to {max(values):.0f})"


def _relation(row: Row, peers: Sequence[Row], test: str) -> str:
    return f"{row.speed(test) / max(peer.speed(test) for peer in peers):.2f}" if peers else ""


def _median(row: Row, name: str) -> float:
    return statistics.median(one[name] for one in row.rounds)
