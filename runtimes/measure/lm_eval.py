"""An artifact under EleutherAI's lm-eval: the three kinds of questions that its tasks ask.

    lm_eval.simple_evaluate(model=llmc.runtimes.measure.lm_eval.harness("out/"), tasks=["hellaswag"])

Texts are cut into tokens and scored as lm-eval's own Hugging Face model does it, so that results can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...errors import LlmcError
from ..generate.llm import LLM
from ..generate.sampling import SamplingParams
from ..generate.tokenizer import Message, Tokenizer
from .evaluate import chunks, log_softmax, window_logits
from .windows import Window, opening

DEFAULT_MAX_TOKENS = 256
# What tasks call the most tokens to make; the first one that is given counts.
_MAX_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = {field.name for field in fields(SamplingParams)} - {"stop", "max_tokens"}


class Request(Protocol):
    """What lm-eval hands over; `args` is all that counts."""

    args: tuple[Any, ...]


class Scorer:
    """Answers lm-eval's requests by an LLM; needs nothing of lm-eval itself.

    Args:
        llm: with a tokenizer.

    Raises:
        LlmcError: TOKENIZER_MISSING.
    """

    def __init__(self, llm: LLM) -> None:
        if llm.tokenizer is None:
            raise LlmcError("TOKENIZER_MISSING", "Tasks are texts, and there is no tokenizer.", "Give an LLM one.")
        self.llm = llm
        self.text_tokenizer: Tokenizer = llm.tokenizer
        self._opening = opening(llm.tokenizer)
        # Something that the first token can be given by: what begins a text, else what ends the one before.
        begins = self._opening if llm.tokenizer.bos_id is None else [llm.tokenizer.bos_id]
        self._prefix = (begins or list(llm.tokenizer.eos_ids))[:1]

    def loglikelihood(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of (context, continuation) each: the continuation's log probability, and whether greedy decoding makes it."""
        return [self._score([self._pair(*request.args)]) for request in requests]

    def loglikelihood_rolling(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[float]:
        """Of (text,) each: its log probability, in windows that hold as much as the engine serves."""
        return [self._score(self._rolling(request.args[0]))[0] for request in requests]

    def generate_until(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[str]:
        """Of (context, options) each: what the model continues it by."""
        asked = [self._generation(*request.args) for request in requests]
        if not asked:
            return []
        made = self.llm.generate([ids for ids, _ in asked], [params for _, params in asked])
        return [one.text for one in made]

    def apply_chat_template(self, chat_history: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """A conversation as the model was taught to read it."""
        return self.text_tokenizer.chat(chat_history, add_generation_prompt)

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in lm-eval's cache of requests."""
        return str(self.text_tokenizer.folder.resolve())

    def _encode(self, text: str) -> list[int]:
        """With its opening, once: a chat template writes it itself."""
        plain = self.text_tokenizer.encode(text, add_special_tokens=False)
        return plain if plain[: len(self._opening)] == self._opening else [*self._opening, *plain]

    def _pair(self, context: str, continuation: str) -> Window:
        room = self.llm.engine.max_seq_len
        if context:
            # A space belongs to the word behind it.
            bare = context.rstrip()
            whole = self._encode(context + continuation)
            first = len(self._encode(bare))
        else:
            plain = self.text_tokenizer.encode(continuation, add_special_tokens=False)
            whole, first = ([*self._prefix, *plain], 1) if plain[:1] != self._prefix else (plain, 1)
        first = max(first, 1)
        if len(whole) - first > room:
            what = f"A continuation has {len(whole) - first} tokens; the artifact serves {room}."
            raise LlmcError("SEQUENCE_TOO_LONG", what, "Compile with a larger --max-seq-len.")
        cut = max(0, len(whole) - room - 1)
        return Window(np.array(whole[cut:], np.int64), first - cut)

    def _rolling(self, text: str) -> Iterator[Window]:
        room = self.llm.engine.max_seq_len
        whole = [*self._prefix, *self.text_tokenizer.encode(text, add_special_tokens=False)]
        for first in range(1, len(whole), room):
            end = min(first + room, len(whole))
            begin = max(0, end - room - 1)
            yield Window(np.array(whole[begin:end], np.int64), first - begin)

    def _score(self, windows: Sequence[Window] | Iterator[Window]) -> tuple[float, bool]:
        engine, total, greedy = self.llm.engine, 0.0, True
        engine.open_slots(1)
        for window in windows:
            if not len(window.targets):
                continue
            logits, targets = window_logits(engine, window), window.targets
            for rows in chunks(*logits.shape):
                right = targets[rows]
                found = log_softmax(logits[rows])
                total += float(found[np.arange(len(right)), right].sum())
                greedy &= bool((found.argmax(1) == right).all())
        return total, greedy

    def _generation(self, context: str, options: Mapping[str, Any]) -> tuple[list[int], SamplingParams]:
        given = dict(options)
        until = given.pop("until", None) or []
        limits = [given.pop(name, None) for name in _MAX_TOKENS]
        if not given.pop("do_sample", True):
            given.pop("temperature", None)
        if unknown := sorted(given.keys() - _SAMPLING):
            what = f"A task asks for {', '.join(unknown)}, which llmc does not know."
            raise LlmcError("SAMPLING_INVALID", what, "Leave it out of the task's generation_kwargs.")
        ids, room = self._encode(context) or self._prefix, self.llm.engine.max_seq_len
        limit = next((int(one) for one in limits if one is not None), DEFAULT_MAX_TOKENS)
        # A long context is cut from the left, but to no less than half of what the engine serves.
        limit = min(limit, max(room - len(ids), room // 2))
        stop = [one for one in ([until] if isinstance(until, str) else until) if one]
        return ids[-(room - limit) :], SamplingParams(max_tokens=limit, stop=stop, **given)


def harness(model: str | Path | LLM, *, threads: int | None = None) -> Any:
    """A model for lm-eval's `simple_evaluate`.

    Args:
        model: the folder of an artifact, or an LLM with a tokenizer.
        threads: to compute an artifact with.

    Raises:
        LlmcError: LM_EVAL_MISSING; and what loading an artifact raises.
    """
    try:
        from lm_eval.api.model import LM
    except ImportError:
        raise LlmcError(
            "LM_EVAL_MISSING", "lm-eval is not installed.", "Install it: pip install 'llmc[eval]'"
        ) from None

    class Harness(Scorer, LM):
        def __init__(self, llm: LLM) -> None:
            LM.__init__(self)
            Scorer.__init__(self, llm)

    return Harness(model if isinstance(model, LLM) else LLM(model, threads=threads))
