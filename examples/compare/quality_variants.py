"""Who stands in the table of quality: a line each. What `prepare.py` can make needs no more than its name there."""

from __future__ import annotations

from dataclasses import dataclass

from prepare import Variant

UNQUANTIZED = 16  # bits from which on a variant only shows that the ruler is right


@dataclass(frozen=True)
class Candidate(Variant):
    """A variant; llmc's is what `llmc compile` makes with these flags."""

    flags: tuple[str, ...] = ()


def _llmc(format: str, bits: int, flags: str = "") -> Candidate:
    return Candidate("llmc", format, bits, tuple(flags.split()))


CANDIDATES = [
    _llmc("fp32", 32),
    _llmc("int8", 8, "--int8"),
    _llmc("int8-rtn", 8, "--int8 --algo rtn"),
    _llmc("int8-channel", 8, "--int8 --group-size channel"),
    _llmc("w8a8", 8, "--quantize w8a8"),
    _llmc("fp8", 8, "--fp8"),
    _llmc("int4", 4, "--int4"),
    _llmc("int4-rtn", 4, "--int4 --algo rtn"),
    _llmc("int4-awq", 4, "--int4 --algo awq"),
    _llmc("int4-g32", 4, "--int4 --group-size 32"),
    _llmc("nf4", 4, "--quantize nf4"),
    Candidate("llama", "F16", 16),
    Candidate("llama", "Q8_0", 8),
    Candidate("llama", "Q6_K", 6),
    Candidate("llama", "Q5_K_M", 5),
    Candidate("llama", "Q4_K_M", 4),
    Candidate("llama", "Q4_0", 4),
    Candidate("genai", "fp32", 32),
    Candidate("genai", "int8", 8),
    Candidate("genai", "int4", 4),
]
