"""The texts that calibration runs on, as tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import LlmcError
from ...runtimes.measure.texts import Text, read_text

if TYPE_CHECKING:
    from ..frontend.sources import ModelSource


@dataclass(frozen=True)
class CalibrationText:
    """What to calibrate on.

    Attributes:
        text: a text file, a .jsonl file, or the name of a built-in text.
        samples: how many sequences.
        length: tokens of each, or as many as the engine serves if that is less.
    """

    text: str = "docstrings"
    samples: int = 16
    length: int = 512

    def __post_init__(self) -> None:
        if self.samples < 1 or self.length < 2:
            raise LlmcError(
                "CONFIG_INVALID",
                f"Calibration with {self.samples} sequences of {self.length} tokens has nothing to look at.",
                "Give 1 sequence or more, of 2 tokens or more.",
            )

    def read(self) -> Text:
        """The text itself, or a refusal of what is none."""
        return read_text(self.text)


def calibration_tokens(source: ModelSource, text: Text, wanted: CalibrationText, max_seq_len: int) -> Tensor:
    """Sequences from all over the text, [samples, length]; fewer if it is short."""
    tokens = torch.tensor(source.tokenizer()(text.content)["input_ids"])
    length = min(wanted.length, max_seq_len, len(tokens))
    if length < 2:
        raise LlmcError(
            "CALIBRATION_TOO_SHORT",
            f"The text {text.source!r} has {len(tokens)} tokens.",
            "Give a longer one: --calib.",
        )
    count = min(wanted.samples, len(tokens) // length)
    starts = torch.linspace(0, len(tokens) - length, count).long()
    return torch.stack([tokens[start : start + length] for start in starts.tolist()])
