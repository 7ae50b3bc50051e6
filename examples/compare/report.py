"""Measurements as a Markdown table, and that table's place in a page."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- compare: begin -->", "<!-- compare: end -->"
OURS = "llmc"
# The least share of next tokens, of those that transformers says, by bits. Random weights make flat logits, of which 4
# bits leave few winners; other weights, or rows rotated in another order, leave none.
_LEAST = {4: 1 / 16, 8: 1 / 2}


@dataclass(frozen=True)
class Row:
    """One engine with one format: what each round measured, as its process printed it."""

    bits: int
    format: str
    rounds: Sequence[dict[str, Any]]

    @property
    def engine(self) -> str:
        return self.rounds[0]["engine"]

    def speeds(self, test: str) -> list[float]:
        """Tokens per second, one figure a round: the median of its repeats."""
        return [statistics.median(one[test]) for one in self.rounds]

    def speed(self, test: str) -> float:
        return statistics.median(self.speeds(test))

    def agreeing(self, expected: Sequence[int]) -> int:
        """How many tokens are those of transformers in float32, each after the same text; in the worst round."""
        return min(sum(a == b for a, b in zip(one["following"], expected, strict=True)) for one in self.rounds)


def table(rows: Sequence[Row], expected: Sequence[int], prompt: int, tokens: int) -> str:
    """A Markdown table; rows of one width stand together and are set in relation to the best peer among them."""
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


def refuse_other_weights(row: Row, expected: Sequence[int]) -> None:
    """Stop where an engine's next tokens are so far from the model's that it must be running something else."""
    if row.agreeing(expected) < _LEAST[row.bits] * len(expected):
        raise SystemExit(
            f"{row.engine} {row.format} continues {row.agreeing(expected)} of {len(expected)} texts as the model in "
            "float32 does: it doesn't run the same weights, so its speed says nothing."
        )


def replace_section(page: Path, text: str) -> None:
    """Put `text` between the page's two markers; what stands around them is untouched."""
    before, after = around_section(page)
    page.write_text(f"{before}{BEGIN}\n{text.strip()}\n{END}{after}")


def around_section(page: Path) -> tuple[str, str]:
    """What stands before and after the two markers of a page; a page without them is refused."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{page} has no place for the table: write {BEGIN} and {END} on lines of their own.")
    return before, after


def _with_range(row: Row, test: str) -> str:
    values = row.speeds(test)
    return f"{row.speed(test):.0f} ({min(values):.0f} to {max(values):.0f})"


def _relation(row: Row, peers: Sequence[Row], test: str) -> str:
    return f"{row.speed(test) / max(peer.speed(test) for peer in peers):.2f}" if peers else ""


def _median(row: Row, name: str) -> float:
    return statistics.median(one[name] for one in row.rounds)
