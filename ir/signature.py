"""The inputs of a program by role. Caches are named in `Program.caches`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Signature:
    """Names of the program's inputs.

    Attributes:
        tokens: token ids, int64 [B, S].
        positions: the position of each token, int64 [B, S]; only before there is a cache.
        starts: how many tokens of each sequence the caches hold already, int64 [B]; only with caches.
        wanted: which of the S tokens get logits, int64 [R]; None if all do.
    """

    tokens: str
    positions: str | None
    starts: str | None = None
    wanted: str | None = None

    @property
    def roles(self) -> dict[str, str]:
        """Roles by the name of the input."""
        return {name: role for role, name in vars(self).items() if name is not None}
