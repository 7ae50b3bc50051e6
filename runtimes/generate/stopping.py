"""From tokens to text that may be shown, and the end of a completion.

Text is given out as soon as nothing that follows can change it: not while a character's last bytes are missing, and
not while it might be the beginning of a stop string. The pieces make up the completion's text, whatever tokens they
came by.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, Protocol

from .sampling import SamplingParams

FinishReason = Literal["stop", "length", "max_seq_len"]
"""An end token, a stop token or a stop string; `max_tokens`; or no room left in the engine's cache."""

_CONTEXT = 6
_UNSETTLED = 64
_REPLACEMENT = "\ufffd"


class Decoder(Protocol):
    """What turns tokens into text."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`."""
        ...


class Detokenizer:
    """Text, token by token, each token read behind those before it.

    What a token adds can depend on its neighbours: a character's bytes may be spread over several tokens, and the
    space before a word is dropped where the word comes first. So the tail of what came before is decoded with it,
    from the prompt on, and what was given out already is cut off.
    """

    def __init__(self, decoder: Decoder, prompt_ids: Sequence[int] = ()) -> None:
        self._decoder = decoder
        size, text = _CONTEXT, _REPLACEMENT
        while text.startswith(_REPLACEMENT):  # cut inside a character, whose rest would spoil what follows
            self._window = [int(token) for token in prompt_ids[-size:]]
            text = self._decode() if size < len(prompt_ids) else ""
            size *= 2
        self._settled = len(self._window)
        self._shown = len(self._decode().rstrip(_REPLACEMENT))

    def push(self, token: int) -> str:
        """What can be shown, now that `token` has come."""
        self._window.append(token)
        text = self._decode()
        # The replacement character stands for bytes that make no character, or none yet.
        whole = text.rstrip(_REPLACEMENT)
        if len(text) == self._shown:
            self._window.pop()  # a special token; the next one is to be read behind words
            return ""
        if len(whole) == len(text):
            return self._settle(text)
        if len(self._window) - self._settled >= _UNSETTLED:  # that long it is no character, but noise
            return self._settle(text)
        piece = whole[self._shown :]
        self._shown = max(self._shown, len(whole))
        return piece

    def flush(self) -> str:
        """What is left at the end: the replacement character, where the last character misses bytes."""
        return self._settle(self._decode())

    def _settle(self, text: str) -> str:
        """Give out the rest of `text`; of the tokens, keep those that the next one is read behind."""
        piece = text[self._shown :]
        del self._window[: self._settled]
        self._settled = len(self._window)
        self._shown = len(self._decode())
        return piece

    def _decode(self) -> str:
        return self._decoder.decode(self._window) if self._window else ""


class StopStrings:
    """Holds text back that may begin a stop string, and ends at the stop string that is complete first."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """What can be shown, and whether a stop string was met; the text then ends before it."""
        if not self._stops:
            return text, False
        text = self._held + text
        # The first one complete, and of those the longest: so it doesn't matter how the text was cut into tokens.
        found = [(text.index(stop) + len(stop), text.index(stop)) for stop in self._stops if stop in text]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        keep = next((n for n in range(min(self._longest - 1, len(text)), 0, -1) if self._begins(text[-n:])), 0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back, at the end."""
        held, self._held = self._held, ""
        return held

    def _begins(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stops)


class Ending:
    """One completion's text and end.

    Args:
        stop_ids: tokens that end it; their own text is not part of it.
        room: the most tokens that the engine has room for behind the prompt.
        decoder: None leaves the text empty.
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
        """What can be shown, now that `token` has come, and why it was the last one if it was."""
        self._count += 1
        early = self._count <= self._params.min_tokens
        if token in self._stop_ids:
            return self._finish("", "stop")
        text = self._detokenizer.push(token) if self._detokenizer else ""
        if not early:
            text, met = self._stops.push(text)
            if met:
                return text, "stop"
        if self._count >= self._params.max_tokens:
            return self._finish(text, "length")
        if self._count >= self._room:
            return self._finish(text, "max_seq_len")
        return text, None

    def _finish(self, text: str, reason: FinishReason) -> tuple[str, FinishReason]:
        rest = self._detokenizer.flush() if self._detokenizer else ""
        rest, met = self._stops.push(rest)
        return text + rest + self._stops.flush(), "stop" if met else reason
