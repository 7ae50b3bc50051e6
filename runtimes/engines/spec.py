"""The properties of an engine that its users may depend on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineSpec:
    """The properties of an engine.

    Attributes:
        vocab_size: the number of logits of a token.
        max_seq_len: the number of positions of a slot.
        device: where it computes, such as "cpu".
        threads: threads that it computes with; None if it doesn't compute on a CPU.
        rollback: how many positions a slot can go back, from the furthest that it has held since it last began at 0;
            None: any number.
        platform: what the numbers may depend on besides the artifact: the device, its driver and the library, each with
            its version. Empty if that doesn't matter.
        ragged: True if one run of the graph serves sequences with different numbers of new tokens.
    """

    vocab_size: int
    max_seq_len: int
    device: str = "cpu"
    threads: int | None = None
    rollback: int | None = None
    ragged: bool = False
    platform: tuple[str, ...] = ()
