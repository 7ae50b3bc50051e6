"""A fake engine with logits by a rule over a slot's tokens; small tokenizers."""

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
    """An engine that computes logits from the tokens of a slot by a rule.

    A wrong slot or start thus leads to a wrong token.

    Attributes:
        calls: (shape of the tokens, starts, slots, last_only) of each forward call.
        opened: the count of each `open_slots` call.
        logits: the result of the last call; the next call fills it with NaN.
    """

    def __init__(self, rule: Rule, vocab_size: int = 32, max_seq_len: int = 64) -> None:
        self.rule, self.vocab_size, self.max_seq_len, self.slots = rule, vocab_size, max_seq_len, 0
        self.calls: list[tuple[tuple[int, ...], list[int], list[int], bool]] = []
        self.opened: list[int] = []
        self.logits = np.empty(0, dtype=np.float32)

    def open_slots(self, count: int) -> None:
        self.slots, self._slots = count, [[] for _ in range(count)]
        self.opened.append(count)

    def forward(
        self, tokens: np.ndarray, starts: np.ndarray, slots: np.ndarray | None = None, last_only: bool = False
    ) -> np.ndarray:
        assert tokens.dtype == starts.dtype == np.int64
        used = list(range(len(tokens))) if slots is None else slots.tolist()
        assert len({*used}) == len(tokens) == len(starts)
        check_fits(starts, tokens.shape[1], self.max_seq_len)
        self.calls.append((tokens.shape, starts.tolist(), used, last_only))
        self.logits.fill(np.nan)
        self.logits = np.empty((*tokens.shape, self.vocab_size), dtype=np.float32)
        for entry, (slot, start) in enumerate(zip(used, starts, strict=True)):
            history = self._slots[slot]
            assert start <= len(history), f"slot {slot} has {len(history)} tokens, not {start}"
            del history[start:]
            for position, token in enumerate(tokens[entry].tolist()):
                history.append(token)
                self.logits[entry, position] = self.rule(tuple(history))
        if last_only:
            self.logits = self.logits[:, -1:]
        return self.logits


def hashed(vocab_size: int = 32) -> Rule:
    """Return a rule with random logits that differ for each history."""
    return lambda history: np.random.default_rng(history).normal(scale=2, size=vocab_size)


def scripted(vocab_size: int, *scripts: tuple[Sequence[int], Sequence[int]]) -> Rule:
    """Return a rule that continues prompts; each script is (prompt, output)."""

    def rule(history: Sequence[int]) -> np.ndarray:
        logits = np.zeros(vocab_size)
        for prompt, output in scripts:
            if tuple(prompt) == tuple(history[: len(prompt)]) and len(history) < len(prompt) + len(output):
                logits[output[len(history) - len(prompt)]] = 10
        return logits

    return rule


EOS, BOS = 256, 257


def byte_tokenizer(folder: Path) -> Tokenizer:
    """Make a byte-level tokenizer: one token per byte, 256 is EOS, 257 is BOS."""
    # Byte-level models map printable bytes to themselves, and the others to characters after 255.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256)]
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
    """Make a tokenizer as of sentencepiece: words with leading space, and bytes."""
    words = ["<unk>", "</s>", "▁Hello", "▁world", "!", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = tokenizers.Tokenizer(
        models.BPE({word: index for index, word in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>")
    )
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer
