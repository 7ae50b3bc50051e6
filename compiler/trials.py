"""Measuring the divergence of a trial artifact from its model, for `--max-kl`."""

from __future__ import annotations

from ..runtimes.generate.tokenizer import Tokenizer
from ..runtimes.measure.evaluate import ReferencePredictions, evaluate
from ..runtimes.measure.texts import read_text
from ..runtimes.measure.windows import Window, cut_windows, opening
from .build import Build
from .compress.quantization import Quantization
from .gate.reference_logits import reference_of
from .gate.verify import open_checked

# Divergence is measured on the beginning of one of these texts: the first that calibration did not use.
TEXTS = ("topics", "docstrings")
TOKENS = 8192
# The mean over a text is off by its standard error, and the limit is meant for other texts too.
_STANDARD_ERRORS = 2


class Trials:
    """Makes artifacts of one build and measures each; the model's own predictions are computed once.

    Args:
        tokens: how many tokens to measure on.
    """

    def __init__(self, build: Build, tokens: int = TOKENS) -> None:
        self.build, self.tokens = build, tokens
        self._windows: list[Window] = []
        self._reference: ReferencePredictions | None = None

    def measure(self, quantization: Quantization) -> float:
        """Return the KL divergence in nats a token, plus two standard errors."""
        build = self.build
        written = build.write(quantization)
        build.writer.seal(written.manifest)
        with build.phases("measure"):
            if self._reference is None:
                self._windows = self._cut_windows()
                self._reference = reference_of(
                    build.source, self._windows, written.manifest.model.vocab_size, watch=build.phases.watch
                )
            engine = open_checked(build.writer.folder)
            found = evaluate(engine, self._windows, self._reference, build.phases.watch).kld
        assert found is not None
        return found.mean + _STANDARD_ERRORS * (found.stderr or 0.0)

    def _cut_windows(self) -> list[Window]:
        tokenizer = Tokenizer(self.build.writer.folder)
        text = next(name for name in TEXTS if name != self.build.config.calib)
        tokens = tokenizer.encode(read_text(text).content, add_special_tokens=False)[: self.tokens]
        return list(cut_windows(tokens, self.build.program.max_seq_len, opening=opening(tokenizer)))
