"""Cache slots: sequences that decode have the first ones, without gaps, so that one run of the graph serves all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..engines.base import Engine
from .sequence import TokenSequence

# A shorter beginning is computed again sooner than it is looked for and copied.
_SHORTEST_REUSE = 16


@dataclass(eq=False)
class _Kept:
    """The tokens that a slot still holds after its sequence has finished.

    Attributes:
        reached: the most positions that the slot has held since it began at 0.
    """

    ids: np.ndarray
    reached: int
    cache_key: str
    used: int


class Slots:
    """The slots of an engine, by their use.

    First the sequences that decode, in adjacent slots from 0 on; then those whose prompts are processed, oldest first.
    Sequences move (`Engine.copy_slot`) to keep this order. Slots after them may keep the content of finished sequences.

    Args:
        most: the largest number of sequences at a time.

    Attributes:
        decoding: the sequences that decode, in the order of their slots.
        reading: the sequences whose prompts are processed, oldest first.
    """

    def __init__(self, engine: Engine, most: int) -> None:
        self._engine = engine
        self._most = most
        self._slot: dict[TokenSequence, int] = {}
        self._kept: dict[int, _Kept] = {}
        self._clock = 0
        self.decoding: list[TokenSequence] = []
        self.reading: list[TokenSequence] = []

    def __getitem__(self, sequence: TokenSequence) -> int:
        return self._slot[sequence]

    def __iter__(self) -> Iterator[TokenSequence]:
        yield from self.decoding
        yield from self.reading

    def __len__(self) -> int:
        return len(self._slot)

    @property
    def free(self) -> int:
        """How many more sequences can be added."""
        return self._most - len(self)

    def reserve(self, more: int) -> None:
        """Open slots for more sequences, as far as the limit allows; open slots keep their content."""
        wanted = min(self._most, len(self) + more)
        if wanted > self._engine.slots:
            self._engine.open_slots(wanted)

    def add(self, sequence: TokenSequence, reuse: bool = True) -> None:
        """Give a new sequence a slot, with the longest beginning of it that a slot holds, if `reuse` is set."""
        self.reserve(1)
        slot = max((self._slot[one] + 1 for one in self), default=0)
        if slot >= self._engine.slots:
            self._close_gaps()
            slot = len(self)
        source, length = self._find_beginning(sequence) if reuse else (None, 0)
        reached = 0 if source is None else self._kept[source].reached
        if source != slot:
            self._move_kept(slot, keep=source)
            if source is not None:
                self._engine.copy_slot(source, slot, length)
        self._kept.pop(slot, None)
        sequence.held = sequence.reused = length
        sequence.reached = reached
        self._slot[sequence] = slot
        self.reading.append(sequence)

    def start_decoding(self, sequence: TokenSequence) -> None:
        """Move the oldest sequence that reads its prompt to those that decode."""
        self.reading.remove(sequence)
        self._move(sequence, len(self.decoding))
        self.decoding.append(sequence)

    def start_again(self, sequence: TokenSequence) -> None:
        """Forget what the slot of a sequence holds; all its tokens must be computed again."""
        self._take_out(sequence)
        sequence.restarted_at = sequence.length
        self.add(sequence, reuse=False)

    def remove(self, sequence: TokenSequence, keep: bool = True) -> None:
        """Free the slot of a sequence; unless `keep` is False, keep its content if a later request may reuse it."""
        slot = self._slot[sequence]
        if keep and sequence.cache_key is not None and sequence.held >= _SHORTEST_REUSE:
            self._clock += 1
            reached = max(sequence.reached, sequence.held)
            self._kept[slot] = _Kept(sequence.ids[: sequence.held].copy(), reached, sequence.cache_key, self._clock)
        self._take_out(sequence)

    def forget(self) -> None:
        """Keep no content of finished sequences."""
        self._kept.clear()

    def _take_out(self, sequence: TokenSequence) -> None:
        hole = self._slot.pop(sequence)
        if sequence in self.reading:
            self.reading.remove(sequence)
            return
        self.decoding.remove(sequence)
        if hole < len(self.decoding):
            last = max(self.decoding, key=self._slot.__getitem__)
            self._move(last, hole)
            self.decoding.sort(key=self._slot.__getitem__)

    def _move(self, sequence: TokenSequence, slot: int) -> None:
        source = self._slot[sequence]
        if source == slot:
            return
        self._move_kept(slot)
        self._engine.copy_slot(source, slot, sequence.held)
        self._slot[sequence] = slot

    def _close_gaps(self) -> None:
        """Move the sequences that read their prompts to the slots right after those that decode."""
        for slot, sequence in enumerate(self.reading, len(self.decoding)):
            self._move(sequence, slot)

    def _move_kept(self, slot: int, keep: int | None = None) -> None:
        """Empty a slot: move what it keeps to an unused slot, or to that of the content that was used longest ago."""
        kept = self._kept.pop(slot, None)
        if kept is None:
            return
        used = {*self._slot.values(), slot, keep}
        if len(used) >= self._engine.slots < self._most:
            self._engine.open_slots(self._engine.slots + 1)
        others = [other for other in range(self._engine.slots) if other not in used]
        if not others:
            return
        target = min(others, key=lambda other: self._kept[other].used if other in self._kept else 0)
        if target not in self._kept or self._kept[target].used < kept.used:
            self._engine.copy_slot(slot, target, len(kept.ids))
            self._kept[target] = kept

    def _find_beginning(self, sequence: TokenSequence) -> tuple[int | None, int]:
        """Return the slot with the longest beginning of a sequence, and its length; (None, 0) if there is none."""
        best: tuple[int | None, int] = None, 0
        for slot, kept in self._kept.items():
            if kept.cache_key == sequence.cache_key:
                length = self._reusable(kept, sequence.ids)
                if length > max(best[1], _SHORTEST_REUSE):
                    best = slot, length
        return best

    def _reusable(self, kept: _Kept, ids: np.ndarray) -> int:
        # The last token is always computed: its logits are wanted.
        shorter = min(len(kept.ids), len(ids) - 1)
        differ = np.flatnonzero(kept.ids[:shorter] != ids[:shorter])
        common = int(differ[0]) if len(differ) else shorter
        rollback = self._engine.spec.rollback
        return common if rollback is None or kept.reached - common <= rollback else 0
