"""Write the candidates as a Markdown table.

It has their size, quality, speed, and the cost of making each.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cost import Cost
from quality_variants import Candidate

ENGINES = {"llmc": "llmc", "llama": "llama.cpp", "genai": "onnxruntime-genai"}
_LONGEST_REASON = 160


@dataclass
class Row:
    """A candidate with its results so far.

    Attributes:
        evaluation: the evaluation, in the layout of `llmc eval --json`.
        rounds: results of the speed protocol, one per round.
        timed_as: the candidate with the same graphs whose rounds these are, if not its own.
        failed: reason why the candidate has no further results.
    """

    candidate: Candidate
    bytes: int | None = None
    weight_bits: float | None = None
    cost: Cost | None = None
    evaluation: Mapping[str, Any] | None = None
    rounds: Sequence[Mapping[str, Any]] = ()
    timed_as: str = ""
    failed: str = ""

    def speed(self, test: str) -> float | None:
        """Tokens per second: the median over the rounds of each round's median repeat."""
        return statistics.median(statistics.median(one[test]) for one in self.rounds) if self.rounds else None


def reason_of(error: BaseException) -> str:
    """Shorten an error to one line for the table.

    For a failed process, it is the last line of its output.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[-1].startswith("failed with status"):
        lines.pop()
    reason = lines[-1] if lines else type(error).__name__
    return reason if len(reason) <= _LONGEST_REASON else f"{reason[:_LONGEST_REASON]}…"


def table(rows: Sequence[Row], prompt: int, tokens: int) -> str:
    """Build the table, smallest candidate first.

    Cells without a result are empty; the last column has the reason.
    """
    head = [
        "engine",
        "format",
        "MB",
        "bits a weight",
        "perplexity",
        "to fp32",
        "KLD mean",
        "KLD p99",
        "same best token",
    ]
    head += [f"tg{tokens} tok/s", f"pp{prompt} tok/s", "made in s", "with peak MB"]
    reasons = any(row.failed for row in rows)
    lines = [
        " | ".join([*head, "failed"][: len(head) + reasons]),
        "---|---" + "|--:" * (len(head) - 2) + "|---" * reasons,
    ]
    for row in sorted(rows, key=lambda row: (row.bytes is None, row.bytes)):
        lines.append(" | ".join([*_cells(row), _escape(row.failed)][: len(head) + reasons]))
    return "\n".join(f"| {line} |" for line in lines)


def _cells(row: Row) -> list[str]:
    cells = [ENGINES[row.candidate.engine], row.candidate.format]
    cells += [_number(row.bytes and row.bytes / 1e6, ".0f"), _number(row.weight_bits, ".2f")]
    if row.evaluation:
        kld = row.evaluation["kld"]
        cells += [_estimate(row.evaluation["perplexity"], ".2f"), _estimate(row.evaluation["ratio"], ".4f")]
        cells += [_with_error(kld["mean"], kld["stderr"], ".3g"), f"{kld['p99']:.3g}"]
        cells += [_estimate(row.evaluation["same_top1"], ".4f")]
    else:
        cells += [""] * 5
    form = "({:.0f})" if row.timed_as else "{:.0f}"
    cells += ["" if (speed := row.speed(test)) is None else form.format(speed) for test in ("tg", "pp")]
    if not row.cost:
        return [*cells, "", ""]
    about = "" if row.cost.quiet else "~"
    return [*cells, f"{about}{row.cost.seconds:.0f}", f"{row.cost.peak_bytes / 1e6:.0f}"]


def _estimate(measured: Mapping[str, Any], form: str) -> str:
    return _with_error(measured["value"], measured["stderr"], form)


def _with_error(value: float, stderr: float | None, form: str) -> str:
    return f"{value:{form}}" if stderr is None else f"{value:{form}} ± {stderr:.1g}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
