"""Cut a text into overlapping windows that score each token once, with context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import LlmcError, UsageError
from ..generate.tokenizer import Tokenizer

DEFAULT_WINDOW = 512


@dataclass(frozen=True)
class Window:
    """A piece of a text that runs as its own sequence; its last tokens are scored.

    Attributes:
        tokens: int64 [S].
        first: index of the first scored token; at least 1, since nothing predicts the first token of a sequence.
    """

    tokens: np.ndarray
    first: int

    @property
    def targets(self) -> np.ndarray:
        """The scored tokens."""
        return self.tokens[self.first :]


def opening(tokenizer: Tokenizer) -> list[int]:
    """Return the tokens that a tokenizer adds before a text, such as BOS."""
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
    """Cut windows that score each token of a text once.

    Without an opening, the first token of the text is not scored, because nothing precedes it.

    Args:
        tokens: the text without special tokens.
        max_seq_len: the engine's limit.
        window: tokens per window, including `opening`; by default 512, or `max_seq_len` if that is smaller.
        stride: text tokens between the beginnings of two windows; by default half a window. Each scored token has at
            least window - stride tokens before it in its window, if the text has that many.
        opening: tokens that begin each window, as they began each sequence of the model's training.

    Raises:
        LlmcError: WINDOW_INVALID, TEXT_TOO_SHORT.
    """
    window = min(DEFAULT_WINDOW, max_seq_len) if window is None else window
    stride = max(1, window // 2) if stride is None else stride
    if not 2 <= window <= max_seq_len:
        what = f"The window has {window} tokens; this artifact allows 2 to {max_seq_len}."
        raise UsageError("WINDOW_INVALID", what, "Choose another --window, or compile with a larger --max-seq-len.")
    if not 1 <= stride <= window - max(1, len(opening)):
        raise UsageError(
            "WINDOW_INVALID",
            f"With a stride of {stride} and a window of {window} tokens, some tokens have no context.",
            f"Choose a --stride from 1 to {window - max(1, len(opening))}.",
        )
    if len(tokens) < 2:
        raise LlmcError(
            "TEXT_TOO_SHORT", f"The text has {len(tokens)} tokens; at least 2 are needed.", "Give a longer text."
        )
    room, scored, windows = window - len(opening), 0 if opening else 1, []
    for begin in range(0, len(tokens), stride):
        end = min(begin + room, len(tokens))
        piece = np.array([*opening, *tokens[begin:end]], np.int64)
        windows.append(Window(piece, len(opening) + scored - begin))
        scored = end
        if end == len(tokens):
            break
    return windows
