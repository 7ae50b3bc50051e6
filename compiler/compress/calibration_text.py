"""Texts for calibration, and their tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import LlmcError, UsageError
from ...runtimes.measure.texts import Text, read_text

if TYPE_CHECKING:
    from ..frontend.sources import ModelSource


@dataclass(frozen=True)
class CalibrationText:
    """The choice of a text to calibrate on.

    Attributes:
        text: the path of a text or .jsonl file, or the name of a built-in text.
        samples: the number of sequences.
        length: the number of tokens of each sequence; at most `max_seq_len` are used.
    """

    text: str = "docstrings"
    samples: int = 16
    length: int = 512

    def __post_init__(self) -> None:
        if self.samples < 1 or self.length < 2:
            raise UsageError(
                "CONFIG_INVALID",
                f"Calibration on {self.samples} sequences of {self.length} tokens is impossible.",
                "Set --calib-samples to 1 or more and --calib-length to 2 or more.",
            )

    def read(self) -> Text:
        """Read the text, or refuse what is not one."""
        return read_text(self.text)


def calibration_tokens(source: ModelSource, text: Text, wanted: CalibrationText, max_seq_len: int) -> Tensor:
    """Return sequences that are evenly spread over the text, [samples, length].

    A short text has fewer or shorter sequences.
    """
    tokens = torch.tensor(source.tokenizer()(text.content)["input_ids"])
    length = min(wanted.length, max_seq_len, len(tokens))
    if length < 2:
        raise LlmcError(
            "CALIBRATION_TOO_SHORT",
            f"The calibration text {text.source!r} has {len(tokens)} tokens, but 2 are needed.",
            "Set --calib to a longer text.",
        )
    count = min(wanted.samples, len(tokens) // length)
    starts = torch.linspace(0, len(tokens) - length, count).long()
    return torch.stack([tokens[start : start + length] for start in starts.tolist()])
