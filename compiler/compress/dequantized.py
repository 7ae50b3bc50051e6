"""Reports about codes of a quantized checkpoint that were not kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ...ir.program import Program
from ...passes.quantize.quantization_plan import Choice, analyse
from ...passes.quantize.schemes import Scheme
from ...runtimes.artifact.manifest import QuantizationSpec


def describe_dequantized(program: Program, stored: Scheme, dtype: str) -> QuantizationSpec | None:
    """Return the manifest entry for a model none of whose weights is quantized.

    None if the checkpoint was not quantized. Else the entry says which codes were dequantized, and why.

    Args:
        program: an optimized program of which no weight will be quantized.
        stored: the target's scheme for codes of a checkpoint.
        dtype: the dtype of all weights.
    """
    choices = analyse(program, stored).weights.values()
    if not (why := why_dequantized_weights(choices)):
        return None
    weights = {dtype: len(choices)}
    return QuantizationSpec(scheme=None, precision=dtype, algorithm="dequantized", why=why, weights=weights)


def why_dequantized_weights(choices: Iterable[Choice]) -> str:
    """Say how many weights of a checkpoint lost their codes, and for which reasons; "" if none did."""
    lost = [choice for choice in choices if choice.not_as_stored]
    if not lost:
        return ""
    again = sum(choice.grid is not None for choice in lost)
    then = f", and {'all' if again == len(lost) else again} of them are quantized again" if again else ""
    noun = "weight" if len(lost) == 1 else "weights"
    reasons = Counter(choice.not_as_stored for choice in lost).most_common()
    listed = [f"{count} because {reason}" if len(reasons) > 1 else str(reason) for reason, count in reasons]
    return f"the checkpoint's codes of {len(lost)} {noun} are not kept{then}: {', '.join(listed)}"
