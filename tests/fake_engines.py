"""A fake engine with logits by a rule over a slot's tokens; small tokenizers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from llmc.errors import UsageError
from llmc.runtimes.engines.batch import Batch, check_slots
from llmc.runtimes.engines.logits import HostLogits
from llmc.runtimes.engines.spec import EngineSpec
from llmc.runtimes.generate.tokenizer import Tokenizer

Rule = Callable[[Sequence[int]], np.ndarray]


class ToyEngine:
    """An engine that computes logits from the tokens of a slot by a rule.

    A wrong slot or start thus leads to a wrong token.

    Args:
        rollback: as in `EngineSpec`; slots that have held more than 8 tokens then refuse to go back further.

    Attributes:
        calls: the batch of each forward call.
        copies: (source, target, length) of each `copy_slot` call.
        opened: the count of each `open_slots` call.
        logits: the result of the last call; the next call fills it with NaN.
    """

    RING = 8

    def __init__(
        self, rule: Rule, vocab_size: int = 32, max_seq_len: int = 64, *, slots: int = 1, rollback: int | None = None
    ) -> None:
        self.rule = rule
        self.spec = EngineSpec(vocab_size, max_seq_len, threads=1, rollback=rollback)
        self.slots = self.runs = 0
        self.calls: list[Batch] = []
        self.copies: list[tuple[int, int, int]] = []
        self.opened: list[int] = []
        self.logits = np.empty(0, dtype=np.float32)
        self._slots: list[list[int]] = []
        self._reached: list[int] = []  # the most tokens that each slot has held since it began at 0
        self.open_slots(slots)

    def open_slots(self, count: int) -> None:
        self._check_open()
        self._slots = [*self._slots[:count], *([] for _ in range(count - self.slots))]
        self._reached = [*self._reached[:count], *(0 for _ in range(count - self.slots))]
        self.slots = count
        self.opened.append(count)

    def forward(self, batch: Batch) -> HostLogits:
        self._check_open()
        batch.check(self.spec, self.slots)
        for slot, start in zip(batch.slots.tolist(), batch.starts.tolist(), strict=True):
            history = self._slots[slot]
            assert start <= len(history), f"slot {slot} has {len(history)} tokens, not {start}"
            rollback, reached = self.spec.rollback, self._reached[slot]
            if rollback is not None and 0 < start < reached - rollback and reached > self.RING:
                raise UsageError("ROLLBACK_TOO_FAR", f"Slot {slot} can't go back to {start}.", "Start again from 0.")
        self.calls.append(batch)
        self.runs += 1
        self.logits.fill(np.nan)
        values = []
        ends = batch.lengths.cumsum()
        for slot, start, end, length in zip(batch.slots, batch.starts, ends, batch.lengths, strict=True):
            history = self._slots[slot]
            self._reached[slot] = max(self._reached[slot] if start else 0, int(start + length))
            del history[start:]
            for token in batch.tokens[end - length : end].tolist():
                history.append(token)
                values.append(self.rule(tuple(history)))
        self.logits = np.array(values, np.float32)[batch.wanted]
        return HostLogits(self.logits)

    def copy_slot(self, source: int, target: int, length: int) -> None:
        self._check_open()
        check_slots(np.array([source, target]), self.slots)
        self.copies.append((source, target, length))
        self._slots[target] = self._slots[source][: length if self.spec.rollback is None else None]
        self._reached[target] = self._reached[source]

    def close(self) -> None:
        self._slots, self.slots = [], -1

    def _check_open(self) -> None:
        if self.slots < 0:
            raise UsageError("ENGINE_CLOSED", "The engine has been closed.", "Load the artifact again.")


class TimedEngine(ToyEngine):
    """A toy engine whose calls take 10 ms and a millisecond for each token, by its own clock."""

    now = 100.0

    def forward(self, batch: Batch) -> HostLogits:
        self.now += 0.01 + 0.001 * len(batch.tokens)
        return super().forward(batch)

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


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
