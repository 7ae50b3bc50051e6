"""Run EleutherAI's lm-eval tasks on an artifact.

    lm_eval.simple_evaluate(model=llmc.runtimes.measure.lm_eval.harness("out/"), tasks=["hellaswag"])

Texts are tokenized and scored as in lm-eval's own Hugging Face model, so results are comparable.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...errors import LlmcError, UsageError
from ...extras import import_failure
from ..generate.llm import LLM
from ..generate.sampling import SamplingParams
from ..generate.tokenizer import Message, Tokenizer
from .evaluate import chunks, log_softmax, window_logits
from .windows import Window, opening

DEFAULT_MAX_TOKENS = 256
# Names that tasks use for the largest number of tokens to generate; the first one that is set counts.
_MAX_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = {field.name for field in fields(SamplingParams)} - {"stop", "max_tokens"}


class Request(Protocol):
    """A request of lm-eval; only `args` is used."""

    args: tuple[Any, ...]


class Scorer:
    """Answers lm-eval's requests with an LLM; doesn't need lm-eval to be installed.

    Args:
        llm: must have a tokenizer.

    Raises:
        LlmcError: TOKENIZER_MISSING.
    """

    def __init__(self, llm: LLM) -> None:
        if llm.tokenizer is None:
            raise LlmcError(
                "TOKENIZER_MISSING",
                "lm-eval's tasks are text, and this LLM has no tokenizer.",
                "Put tokenizer.json into the artifact, or pass `tokenizer` to LLM.",
            )
        self.llm = llm
        self.text_tokenizer: Tokenizer = llm.tokenizer
        self._opening = opening(llm.tokenizer)
        # A token that can predict the first token of a text: the one that begins a text, else one that ends a text.
        begins = self._opening if llm.tokenizer.bos_id is None else [llm.tokenizer.bos_id]
        self._prefix = (begins or list(llm.tokenizer.eos_ids))[:1]

    def loglikelihood(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score continuations; the `args` of a request are (context, continuation).

        Returns:
            For each request, the log probability of the continuation, and True if greedy decoding generates it.
        """
        return [self._score([self._pair(*request.args)]) for request in requests]

    def loglikelihood_rolling(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[float]:
        """Return the log probability of whole texts, in windows of `max_seq_len`.

        The `args` of a request are (text,).
        """
        return [self._score(self._rolling(request.args[0]))[0] for request in requests]

    def generate_until(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[str]:
        """Generate continuations; the `args` of a request are (context, options)."""
        prompts = [self._generation(*request.args) for request in requests]
        if not prompts:
            return []
        completions = self.llm.generate([ids for ids, _ in prompts], [params for _, params in prompts])
        return [completion.text for completion in completions]

    def apply_chat_template(self, chat_history: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """Render a conversation with the model's chat template."""
        return self.text_tokenizer.chat(chat_history, add_generation_prompt)

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer in lm-eval's request cache."""
        return str(self.text_tokenizer.folder.resolve())

    def _encode(self, text: str) -> list[int]:
        """Encode with the opening; a chat template may already have added it."""
        plain = self.text_tokenizer.encode(text, add_special_tokens=False)
        return plain if plain[: len(self._opening)] == self._opening else [*self._opening, *plain]

    def _pair(self, context: str, continuation: str) -> Window:
        """Make a window that scores the continuation, with as much context as fits."""
        limit = self.llm.engine.spec.max_seq_len
        if context:
            # Trailing spaces of the context belong to the next word, so they are scored with the continuation.
            whole = self._encode(context + continuation)
            first = len(self._encode(context.rstrip()))
        else:
            plain = self.text_tokenizer.encode(continuation, add_special_tokens=False)
            whole, first = ([*self._prefix, *plain], 1) if plain[:1] != self._prefix else (plain, 1)
        first = max(first, 1)
        if len(whole) - first > limit:
            what = f"A continuation has {len(whole) - first} tokens; the artifact allows {limit}."
            raise UsageError("SEQUENCE_TOO_LONG", what, "Compile with a larger --max-seq-len.")
        cut = max(0, len(whole) - limit - 1)
        return Window(np.array(whole[cut:], np.int64), first - cut)

    def _rolling(self, text: str) -> Iterator[Window]:
        """Make windows that score each token once, with as much context as fits."""
        limit = self.llm.engine.spec.max_seq_len
        whole = [*self._prefix, *self.text_tokenizer.encode(text, add_special_tokens=False)]
        for first in range(1, len(whole), limit):
            end = min(first + limit, len(whole))
            begin = max(0, end - limit - 1)
            yield Window(np.array(whole[begin:end], np.int64), first - begin)

    def _score(self, windows: Sequence[Window] | Iterator[Window]) -> tuple[float, bool]:
        """Sum the log probabilities of the targets.

        The flag is True if every target is the most probable token.
        """
        engine, total, greedy = self.llm.engine, 0.0, True
        self.llm.forget()
        engine.open_slots(1)
        for window in windows:
            if not len(window.targets):
                continue
            logits, targets = window_logits(engine, window), window.targets
            for chunk in chunks(*logits.shape):
                right = targets[chunk]
                log_probabilities = log_softmax(logits[chunk])
                total += float(log_probabilities[np.arange(len(right)), right].sum())
                greedy &= bool((log_probabilities.argmax(1) == right).all())
        return total, greedy

    def _generation(self, context: str, options: Mapping[str, Any]) -> tuple[list[int], SamplingParams]:
        """Turn a context and a task's `generation_kwargs` into prompt and parameters."""
        sampling = dict(options)
        until = sampling.pop("until", None) or []
        limits = [sampling.pop(name, None) for name in _MAX_TOKENS]
        if not sampling.pop("do_sample", True):
            sampling.pop("temperature", None)
        if unknown := sorted(sampling.keys() - _SAMPLING):
            what = f"A task sets {', '.join(unknown)}, which llmc does not support."
            raise UsageError("SAMPLING_INVALID", what, "Remove it from the task's generation_kwargs.")
        ids, max_seq_len = self._encode(context) or self._prefix, self.llm.engine.spec.max_seq_len
        max_tokens = next((int(limit) for limit in limits if limit is not None), DEFAULT_MAX_TOKENS)
        # A long context is cut from the left to make room, but keeps at least half of max_seq_len.
        max_tokens = min(max_tokens, max(max_seq_len - len(ids), max_seq_len // 2))
        stop = [text for text in ([until] if isinstance(until, str) else until) if text]
        return ids[-(max_seq_len - max_tokens) :], SamplingParams(max_tokens=max_tokens, stop=stop, **sampling)


def harness(model: str | Path | LLM, *, threads: int | None = None) -> Any:
    """Make a model for lm-eval's `simple_evaluate`.

    Args:
        model: the folder of an artifact, or an LLM with a tokenizer.
        threads: threads of the artifact's engine; by default the engine decides.

    Raises:
        LlmcError: EXTRA_MISSING, and the errors of loading an artifact.
    """
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise import_failure(error) or error from None

    class Harness(Scorer, LM):
        def __init__(self, llm: LLM) -> None:
            LM.__init__(self)
            Scorer.__init__(self, llm)

    return Harness(model if isinstance(model, LLM) else LLM(model, threads=threads))
