"""`--max-kl`: the smallest artifact that, as it is measured, stays under a divergence from the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ...errors import LlmcError
from ...runtimes.engines.load import load
from ...runtimes.generate.tokenizer import Tokenizer
from ...runtimes.measure.evaluate import KlDivergence, ReferencePredictions, evaluate
from ...runtimes.measure.texts import read_text
from ...runtimes.measure.windows import Window, cut_windows, opening
from ..build import Build
from ..gate.reference_logits import reference_of
from .bit_search import find_cheapest
from .quantization import Quantization

# What is measured: the beginning of a text that comes with Python, the one that nothing was calibrated on.
TEXTS, TOKENS = ("topics", "docstrings"), 8192
# A mean over a text is off by its standard error, and the limit is meant for other texts too.
_ERRORS = 2


def keep_under(limit: float, rounding: Quantization, build: Build) -> Quantization:
    """Raise the bits of as few weights as the limit takes.

    Raises:
        LlmcError: MAX_KL_UNREACHED if even all of them on more bits are above it.
    """
    windows: list[Window] = []
    reference: list[ReferencePredictions] = []

    def measure(count: int) -> float:
        written = build.write(rounding.raise_bits(one.name for one in rounding.candidates[:count]))
        build.writer.seal(written.manifest)
        with build.phases("measure"):
            if not windows:
                windows.extend(_windows(build))
                vocab_size = int(written.manifest.model["vocab_size"])
                reference.append(reference_of(build.source, windows, vocab_size, watch=build.phases.watch))
            found = evaluate(load(build.writer.folder), windows, reference[0], build.phases.watch).kld
        assert found is not None
        return _pessimistic(found)

    best, trials = find_cheapest(rounding.candidates, limit, measure)
    if best is None:
        least = min(trial.measured for trial in trials)
        raise LlmcError(
            "MAX_KL_UNREACHED",
            f"With all linears on 8 bits the divergence is still {least:.2g} nats a token, the limit is {limit:g}.",
            "Give a larger --max-kl, or compile with --int8, whose scales are finer.",
        )
    kept = rounding.raise_bits(one.name for one in rounding.candidates[: best.raised])
    return replace(kept, measured={"limit": limit, "measured": best.measured, "tokens": TOKENS, "trials": len(trials)})


def _pessimistic(found: KlDivergence) -> float:
    return found.mean + _ERRORS * (found.stderr or 0.0)


def _windows(build: Build) -> Sequence[Window]:
    tokenizer = Tokenizer(build.writer.folder)
    text = next(name for name in TEXTS if name != build.config.calibration.text)
    tokens = tokenizer.encode(read_text(text).content, add_special_tokens=False)[:TOKENS]
    return cut_windows(tokens, build.program.max_seq_len, opening=opening(tokenizer))
