"""List the candidates of the quality table, one per line.

Variants of `prepare.py` need only their name.
"""

from __future__ import annotations

from dataclasses import dataclass

from environments import HERE
from prepare import Variant

UNQUANTIZED = 16  # candidates with at least this many bits only show that the measurement is right


@dataclass(frozen=True)
class Candidate(Variant):
    """A variant of an engine; for llmc, `flags` are the flags of `llmc compile`."""

    flags: tuple[str, ...] = ()


def _llmc(format: str, bits: int, flags: str = "") -> Candidate:
    return Candidate("llmc", format, bits, tuple(flags.split()))


CANDIDATES = [
    _llmc("fp32", 32),
    _llmc("fp32-kv-int8", 32, "--kv-cache-dtype int8"),
    _llmc("fp32-kv-fp8", 32, "--kv-cache-dtype fp8"),
    _llmc("int8", 8, "--int8"),
    _llmc("int8-kv-int8", 8, "--int8 --kv-cache-dtype int8"),
    _llmc("int8-rtn", 8, "--int8 --algo rtn"),
    _llmc("int8-awq", 8, "--int8 --algo awq"),
    _llmc("int8-gptq", 8, "--int8 --algo gptq"),
    _llmc("int8-channel", 8, "--int8 --group-size channel"),
    _llmc("w8a8", 8, "--quantize w8a8"),
    _llmc("w8a8-rtn", 8, "--quantize w8a8 --algo rtn"),
    _llmc("w8a8-gptq", 8, "--quantize w8a8 --algo gptq"),
    _llmc("w8a8-static", 8, f"--config {HERE / 'w8a8-static.json'}"),
    _llmc("fp8", 8, "--fp8"),
    _llmc("fp8-rtn", 8, "--fp8 --algo rtn"),
    _llmc("fp8-smoothquant", 8, "--fp8 --algo smoothquant"),
    _llmc("int4", 4, "--int4"),
    _llmc("int4-exact-prompts", 4, "--int4 --no-round-prompts"),
    _llmc("int4-under-0.02", 4, "--int4 --max-kl 0.02"),
    # Without raised layers: the algorithms compared at equal schemes.
    _llmc("int4-rtn", 4, "--int4 --algo rtn"),
    _llmc("int4-smoothquant-raise-0", 4, "--int4 --algo smoothquant --raise 0"),
    _llmc("int4-awq-raise-0", 4, "--int4 --algo awq --raise 0"),
    _llmc("int4-gptq-raise-0", 4, "--int4 --raise 0"),
    _llmc("int4-gptq-g64-raise-0", 4, "--int4 --group-size 64 --raise 0"),
    _llmc("nf4", 4, "--quantize nf4"),
    _llmc("nf4-awq", 4, "--quantize nf4 --algo awq"),
    _llmc("nf4-gptq", 4, "--quantize nf4 --algo gptq"),
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
