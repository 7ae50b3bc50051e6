"""`--max-kl`: the smallest artifact whose measured divergence from the model stays under a limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ...errors import LlmcError
from ...runtimes.artifact.manifest import MaxKlSpec
from .bit_search import find_smallest
from .quantization import Quantization


def keep_under(
    limit: float, quantization: Quantization, measure: Callable[[Quantization], float], tokens: int
) -> Quantization:
    """Give more bits to as few weights as the limit allows.

    Args:
        measure: makes an artifact of a choice of bits and returns its divergence in nats, with a margin for the
            error of the measurement.
        tokens: how many it is measured on.

    Raises:
        LlmcError: MAX_KL_UNREACHED if the divergence is above the limit even with more bits for all weights.
    """

    def with_raised(count: int) -> Quantization:
        return quantization.raise_bits(one.name for one in quantization.candidates[:count])

    best, trials = find_smallest(quantization.candidates, limit, lambda count: measure(with_raised(count)))
    if best is None:
        least = min(trial.measured for trial in trials)
        raise LlmcError(
            "MAX_KL_UNREACHED",
            f"With all linears in 8 bits the divergence is still {least:.2g} nats a token, above the limit {limit:g}.",
            "Give a larger --max-kl, or compile with --int8, whose scales are finer.",
        )
    result = MaxKlSpec(limit=limit, measured=best.measured, tokens=tokens, trials=len(trials))
    return replace(with_raised(best.raised), max_kl=result)
