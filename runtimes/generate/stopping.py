"""Incremental detokenization and stop conditions of a completion.

Text is returned as soon as later tokens can't change it: not while a character's last bytes are missing, and not while
it could be the beginning of a stop string. The pieces join to the completion's text, however it is split into tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, Protocol

from .sampling import SamplingParams

FinishReason = Literal["stop", "length", "max_seq_len"]
"""`stop`: an end token, a stop token or a stop string. `length`: `max_tokens`. `max_seq_len`: the cache is full."""

_CONTEXT = 6  # tokens of the prompt that the first output token is decoded after
_UNSETTLED = 64  # tokens without a whole character, after which they count as noise
_REPLACEMENT = "\ufffd"  # decoded from bytes that are no character, or not yet a whole one


class Decoder(Protocol):
    """Turns tokens into text."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`."""
        ...


class Detokenizer:
    """Turns a growing token sequence into text, piece by piece.

    A token's text can depend on its neighbours: a character's bytes may be spread over several tokens, and the space
    before a word is dropped at the beginning of a text. So each token is decoded together with the last tokens before
    it (at first those of the prompt), and the text that was already returned is cut off.
    """

    def __init__(self, decoder: Decoder, prompt_ids: Sequence[int] = ()) -> None:
        self._decoder = decoder
        size, text = _CONTEXT, _REPLACEMENT
        while text.startswith(_REPLACEMENT):  # the cut is inside a character: take more tokens
            self._window = [int(token) for token in prompt_ids[-size:]]
            text = self._decode() if size < len(prompt_ids) else ""
            size *= 2
        self._settled = len(self._window)
        self._shown = len(self._decode().rstrip(_REPLACEMENT))

    def push(self, token: int) -> str:
        """Append `token` and return the text that can be shown now."""
        self._window.append(token)
        text = self._decode()
        whole = text.rstrip(_REPLACEMENT)
        if len(text) == self._shown:
            self._window.pop()  # a special token without text: keep words as the context of the next token
            return ""
        if len(whole) == len(text):
            return self._settle(text)
        if len(self._window) - self._settled >= _UNSETTLED:
            return self._settle(text)
        piece = whole[self._shown :]
        self._shown = max(self._shown, len(whole))
        return piece

    def flush(self) -> str:
        """Return the rest at the end: U+FFFD if the last character is incomplete."""
        return self._settle(self._decode())

    def _settle(self, text: str) -> str:
        """Return the rest of `text`; its tokens become the context of the next token."""
        piece = text[self._shown :]
        del self._window[: self._settled]
        self._settled = len(self._window)
        self._shown = len(self._decode())
        return piece

    def _decode(self) -> str:
        return self._decoder.decode(self._window) if self._window else ""


class StopStrings:
    """Finds the first complete stop string; holds back text that could begin one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Append `text`; return the text that can be shown.

        The flag is True if that text ends at a stop string.
        """
        if not self._stops:
            return text, False
        text = self._held + text
        # Take the stop string that ends first, and the longest of those: independent of the split into tokens.
        spans = [(text.index(stop) + len(stop), text.index(stop)) for stop in self._stops if stop in text]
        if spans:
            self._held = ""
            return text[: min(spans)[1]], True
        keep = next((n for n in range(min(self._longest - 1, len(text)), 0, -1) if self._begins(text[-n:])), 0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """Return the text that was held back, at the end."""
        held, self._held = self._held, ""
        return held

    def _begins(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stops)


class Ending:
    """Produces the text of one completion and detects its end.

    Args:
        stop_ids: tokens that end the completion; its text excludes them.
        room: the largest number of tokens that fit into the cache after the prompt.
        decoder: with None, the text is empty.
    """

    def __init__(
        self,
        params: SamplingParams,
        stop_ids: Collection[int],
        room: int,
        decoder: Decoder | None = None,
        prompt_ids: Sequence[int] = (),
    ) -> None:
        self._params = params
        self._stop_ids = frozenset(stop_ids)
        self._room = room
        self._detokenizer = Detokenizer(decoder, prompt_ids) if decoder else None
        self._stops = StopStrings(params.stop)
        self._count = 0

    def push(self, token: int) -> tuple[str, FinishReason | None]:
        """Append `token`; return the text that can be shown.

        The finish reason is None unless this was the last token.
        """
        self._count += 1
        early = self._count <= self._params.min_tokens
        if token in self._stop_ids:
            return self._finish("", "stop")
        text = self._detokenizer.push(token) if self._detokenizer else ""
        if not early:
            text, stopped = self._stops.push(text)
            if stopped:
                return text, "stop"
        if self._count >= self._params.max_tokens:
            return self._finish(text, "length")
        if self._count >= self._room:
            return self._finish(text, "max_seq_len")
        return text, None

    def _finish(self, text: str, reason: FinishReason) -> tuple[str, FinishReason]:
        rest = self._detokenizer.flush() if self._detokenizer else ""
        rest, stopped = self._stops.push(rest)
        return text + rest + self._stops.flush(), "stop" if stopped else reason
