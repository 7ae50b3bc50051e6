"""Engines whose next token is a function of what a slot holds, and tokenizers small enough to read."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from llmc.runtimes.engines.base import check_fits
from llmc.runtimes.generate.tokenizer import Tokenizer

Rule = Callable[[Sequence[int]], np.ndarray]


class ToyEngine:
    """Logits by a rule over the tokens that a slot holds, so that a wrong slot or start is a wrong token.

    Attributes:
        calls: (shape of the tokens, starts, slots, last_only) of each forward call.
        opened: the counts that slots were opened for.
        logits: what the last call returned; the next call spoils it.
    """

    def __init__(self, rule: Rule, vocab_size: int = 32, max_seq_len: int = 64) -> None:
        self.rule, self.vocab_size, self.max_seq_len, self.slots = rule, vocab_size, max_seq_len, 0
        self.calls: list[tuple[tuple[int, ...], list[int], list[int], bool]] = []
        self.opened: list[int] = []
        self.logits = np.empty(0, dtype=np.float32)

    def open_slots(self, count: int) -> None:
        self.slots, self._held = count, [[] for _ in range(count)]
        self.opened.append(count)

    def forward(
        self, tokens: np.ndarray, starts: np.ndarray, slots: np.ndarray | None = None, last_only: bool = False
    ) -> np.ndarray:
        assert tokens.dtype == starts.dtype == np.int64
        places = list(range(len(tokens))) if slots is None else slots.tolist()
        assert len({*places}) == len(tokens) == len(starts)
        check_fits(starts, tokens.shape[1], self.max_seq_len)
        self.calls.append((tokens.shape, starts.tolist(), places, last_only))
        self.logits.fill(np.nan)
        self.logits = np.empty((*tokens.shape, self.vocab_size), dtype=np.float32)
        for row, (place, start) in enumerate(zip(places, starts, strict=True)):
            held = self._held[place]
            assert start <= len(held), f"slot {place} holds {len(held)} tokens, not {start}"
            del held[start:]
            for column, token in enumerate(tokens[row].tolist()):
                held.append(token)
                self.logits[row, column] = self.rule(tuple(held))
        if last_only:
            self.logits = self.logits[:, -1:]
        return self.logits


def hashed(vocab_size: int = 32) -> Rule:
    """Other logits for each history."""
    return lambda history: np.random.default_rng(history).normal(scale=2, size=vocab_size)


def scripted(vocab_size: int, *scripts: tuple[Sequence[int], Sequence[int]]) -> Rule:
    """Behind each prompt its continuation."""

    def rule(history: Sequence[int]) -> np.ndarray:
        logits = np.zeros(vocab_size)
        for prompt, output in scripts:
            if tuple(prompt) == tuple(history[: len(prompt)]) and len(history) < len(prompt) + len(output):
                logits[output[len(history) - len(prompt)]] = 10
        return logits

    return rule


EOS, BOS = 256, 257


def byte_tokenizer(folder: Path) -> Tokenizer:
    """A token for each byte, as byte-level models have them; 256 ends an output, 257 begins a text."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}  # a byte as a letter of its own, the rest behind 255
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = [chr(byte if byte in shown else 256 + hidden.index(byte)) for byte in range(256)]
    tokenizer = tokenizers.Tokenizer(models.BPE({letter: byte for byte, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>", "<begin>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", BOS)])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "<begin>{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS}))
    return Tokenizer(folder)


def word_tokenizer() -> tokenizers.Tokenizer:
    """Words that carry their space, and bytes for what has no word, as sentencepiece models have them."""
    words = ["<unk>", "</s>", "▁Hello", "▁world", "!", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = tokenizers.Tokenizer(
        models.BPE({word: index for index, word in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>")
    )
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer
