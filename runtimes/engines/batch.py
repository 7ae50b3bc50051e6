"""The input of an engine's forward call: new tokens of several sequences."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from ...errors import UsageError
from .spec import EngineSpec

Wanted = Literal["all", "last", "none"]
"""The tokens of a sequence whose logits a call returns."""


class NewTokens(NamedTuple):
    """New tokens of one sequence.

    Attributes:
        tokens: token ids.
        start: the number of positions that the sequence already holds.
        slot: its cache slot.
        logits: the tokens whose logits are wanted.
    """

    tokens: Sequence[int] | np.ndarray
    start: int = 0
    slot: int = 0
    logits: Wanted = "last"


@dataclass(frozen=True, eq=False)
class Batch:
    """New tokens of several sequences, one sequence after the other.

    Attributes:
        tokens: int64 [N], the new tokens of all sequences.
        lengths: int64 [B], the number of new tokens of each sequence, at least 1.
        starts: int64 [B], the number of positions that each sequence already holds.
        slots: int64 [B], the cache slot of each sequence, each at most once.
        wanted: int64 [R], ascending indices of the tokens whose logits are returned.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    starts: np.ndarray
    slots: np.ndarray
    wanted: np.ndarray

    @classmethod
    def of(cls, *parts: NewTokens) -> Batch:
        """Join the new tokens of sequences."""
        tokens = [np.asarray(part.tokens, np.int64).reshape(-1) for part in parts]
        lengths = [len(one) for one in tokens]
        wanted: list[int] = []
        for part, length, end in zip(parts, lengths, itertools.accumulate(lengths), strict=True):
            wanted += range(end - {"all": length, "last": min(1, length), "none": 0}[part.logits], end)
        return cls(
            tokens[0] if len(tokens) == 1 else np.concatenate([np.empty(0, np.int64), *tokens]),
            *(
                np.array(numbers, np.int64)
                for numbers in (lengths, [part.start for part in parts], [part.slot for part in parts], wanted)
            ),
        )

    @classmethod
    def one(cls, tokens: Sequence[int] | np.ndarray, start: int = 0, slot: int = 0, logits: Wanted = "all") -> Batch:
        """Return a batch of a single sequence."""
        return cls.of(NewTokens(tokens, start, slot, logits))

    @classmethod
    def step(cls, tokens: np.ndarray, starts: np.ndarray, slots: np.ndarray | None = None) -> Batch:
        """Return a batch of one new token per sequence, all of whose logits are wanted.

        Args:
            slots: by default 0 to B-1.
        """
        count = np.arange(len(tokens))
        return cls(tokens, np.ones(len(tokens), np.int64), starts, count if slots is None else slots, count)

    def check(self, spec: EngineSpec, slots: int) -> None:
        """Refuse a batch that an engine with this many open slots can't run.

        Raises:
            UsageError: BATCH_INVALID, SEQUENCE_TOO_LONG, TOKEN_UNKNOWN or SLOT_CLOSED.
        """
        if problem := self._problem():
            raise UsageError("BATCH_INVALID", f"The batch is inconsistent: {problem}.", "Build it with Batch.of.")
        longest = int((self.starts + self.lengths).max())
        if longest > spec.max_seq_len:
            raise UsageError(
                "SEQUENCE_TOO_LONG",
                f"A sequence would hold {longest} tokens; this engine has room for {spec.max_seq_len}.",
                "Shorten it, or compile with a larger --max-seq-len.",
            )
        if self.tokens.min() < 0 or self.tokens.max() >= spec.vocab_size:
            raise UsageError(
                "TOKEN_UNKNOWN",
                f"A token id is outside 0..{spec.vocab_size - 1}.",
                "Use the tokenizer in the artifact.",
            )
        check_slots(self.slots, slots)

    def _problem(self) -> str | None:
        # Lists, because numpy takes several times as long for a few numbers, and this is in each step of a sequence.
        lengths, starts, slots = self.lengths.tolist(), self.starts.tolist(), self.slots.tolist()
        if not lengths:
            return "it has no sequence"
        if len(starts) != len(lengths) or len(slots) != len(lengths):
            return f"{len(lengths)} lengths, {len(starts)} starts and {len(slots)} slots"
        if min(lengths) < 1 or sum(lengths) != len(self.tokens):
            return f"the lengths {lengths} for {len(self.tokens)} tokens"
        if min(starts) < 0:
            return f"the start {min(starts)}"
        if len(set(slots)) != len(slots):
            return f"the slots {slots}, of which one is twice"
        wanted = self.wanted
        if len(wanted) and (
            wanted[0] < 0 or wanted[-1] >= len(self.tokens) or (len(wanted) > 1 and (np.diff(wanted) <= 0).any())
        ):
            return "the wanted indices are not ascending indices of its tokens"
        return None


def check_slots(slots: np.ndarray, count: int) -> None:
    """Refuse slots that are not among the `count` open ones.

    Raises:
        UsageError: SLOT_CLOSED.
    """
    if len(slots) and (slots.min() < 0 or slots.max() >= count):
        closed = next(int(slot) for slot in slots if not 0 <= slot < count)
        raise UsageError("SLOT_CLOSED", f"Slot {closed} is not open: there are {count}.", "Call open_slots first.")
