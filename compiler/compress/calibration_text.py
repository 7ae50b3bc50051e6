"""Texts for calibration, and their tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import LlmcError
from ...runtimes.measure.texts import Text

if TYPE_CHECKING:
    from ..frontend.sources import ModelSource


def calibration_tokens(source: ModelSource, text: Text, samples: int, length: int, max_seq_len: int) -> Tensor:
    """Return sequences from all over the text, [samples, length]; fewer or shorter ones if it is short."""
    tokens = torch.tensor(source.tokenizer()(text.content)["input_ids"])
    length = min(length, max_seq_len, len(tokens))
    if length < 2:
        raise LlmcError(
            "CALIBRATION_TOO_SHORT",
            f"The calibration text {text.source!r} has {len(tokens)} tokens, but 2 are needed.",
            "Set --calib to a longer text.",
        )
    count = min(samples, len(tokens) // length)
    starts = torch.linspace(0, len(tokens) - length, count).long()
    return torch.stack([tokens[start : start + length] for start in starts.tolist()])
