"""A text cut into windows that overlap, so that each of its tokens is scored once and with context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import LlmcError
from ..generate.tokenizer import Tokenizer

DEFAULT_WINDOW = 512


@dataclass(frozen=True)
class Window:
    """A piece of a text that is run as a sequence of its own; the tokens from `first` on are scored.

    Attributes:
        tokens: int64 [S].
        first: 1 at least, for the first token of a sequence is given by nothing.
    """

    tokens: np.ndarray
    first: int

    @property
    def targets(self) -> np.ndarray:
        return self.tokens[self.first :]


def opening(tokenizer: Tokenizer) -> list[int]:
    """The tokens that a tokenizer puts before a text, such as one for its beginning."""
    plain, full = (tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
    starts = range(len(full) - len(plain) + 1)
    return full[: next((i for i in starts if full[i : i + len(plain)] == plain), 0)]


def cut_windows(
    tokens: Sequence[int],
    max_seq_len: int,
    window: int | None = None,
    stride: int | None = None,
    opening: Sequence[int] = (),
) -> list[Window]:
    """Windows that score each token of a text once; without an opening the first token can't be, and is not.

    Args:
        tokens: of the text alone.
        max_seq_len: what the engine serves.
        window: tokens of a window, `opening` among them; 512 if the engine serves so many.
        stride: the text's tokens from one window's beginning to the next one's; by default half a window. A token has
            at least window - stride tokens before it in its window, where the text has so many.
        opening: tokens that begin each window, as they begin every sequence that the model was taught with.

    Raises:
        LlmcError: WINDOW_INVALID, TEXT_TOO_SHORT.
    """
    window = min(DEFAULT_WINDOW, max_seq_len) if window is None else window
    stride = max(1, window // 2) if stride is None else stride
    if not 2 <= window <= max_seq_len:
        what = f"A window of {window} tokens: 2 to {max_seq_len} are what this artifact serves."
        raise LlmcError("WINDOW_INVALID", what, "Choose another --window, or compile with a larger --max-seq-len.")
    if not 1 <= stride <= window - max(1, len(opening)):
        raise LlmcError(
            "WINDOW_INVALID",
            f"A stride of {stride} with a window of {window} tokens leaves tokens without any context.",
            f"Choose a --stride from 1 to {window - max(1, len(opening))}.",
        )
    if len(tokens) < 2:
        raise LlmcError(
            "TEXT_TOO_SHORT", f"The text has {len(tokens)} tokens; there is nothing to predict.", "Give a longer one."
        )
    room, scored, found = window - len(opening), 0 if opening else 1, []
    for begin in range(0, len(tokens), stride):
        end = min(begin + room, len(tokens))
        piece = np.array([*opening, *tokens[begin:end]], np.int64)
        found.append(Window(piece, len(opening) + scored - begin))
        scored = end
        if end == len(tokens):
            break
    return found
